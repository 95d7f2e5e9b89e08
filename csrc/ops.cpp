// Every op's schema: the table of contents of the native code. `w` are the tensors of a frozen weight, or of several,
// and `wf` says what they are: csrc/common/weight_format.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(peftkern, m) {
    m.def("nf4_quantize(Tensor weight, int block_size) -> (Tensor codes, Tensor absmax)");
    m.def(
        "nf4_quantize_absmax(Tensor absmax, Tensor quant_map, Tensor offset) -> (Tensor bytes, Tensor nested_absmax)");
    m.def("nf4_dequantize(Tensor[] w, SymInt[] wf, ScalarType dtype) -> Tensor weight");
    m.def("nf4_linear(Tensor x, Tensor[] w, SymInt[] wf, Tensor? bias) -> Tensor y");
    m.def("nf4_linear_backward(Tensor grad_y, Tensor[] w, SymInt[] wf) -> Tensor grad_x");
    m.def(
        "lora_linear(Tensor x, Tensor[] w, SymInt[] wf, Tensor lora_a, Tensor lora_b, float scaling, Tensor? bias, "
        "float dropout_p, Tensor? seed) -> (Tensor y, Tensor h)");
    m.def(
        "lora_linear_backward(Tensor grad_y, Tensor x, Tensor h, Tensor[] w, SymInt[] wf, Tensor lora_a, "
        "Tensor lora_b, float scaling, float dropout_p, Tensor? seed, bool need_x, bool need_a, bool need_b) "
        "-> (Tensor grad_x, Tensor grad_a, Tensor grad_b)");
    m.def(
        "lora_qkv(Tensor x, Tensor[] w, SymInt[] wf, Tensor[] lora_as, Tensor[] lora_bs, float[] scalings, "
        "Tensor[] biases, float dropout_p, Tensor? seeds) -> (Tensor[] ys, Tensor h)");
    m.def(
        "lora_qkv_backward(Tensor[] grad_ys, Tensor x, Tensor h, Tensor[] w, SymInt[] wf, Tensor[] lora_as, "
        "Tensor[] lora_bs, float[] scalings, float dropout_p, Tensor? seeds, bool need_x, bool need_a, bool need_b) "
        "-> (Tensor grad_x, Tensor grad_a, Tensor[] grad_bs)");
    m.def(
        "lora_mlp(Tensor x, Tensor[] w, SymInt[] wf, Tensor[] lora_as, Tensor[] lora_bs, float[] scalings, "
        "Tensor[] biases, str activation, float dropout_p, Tensor? seeds) -> (Tensor y, Tensor gate, Tensor up, "
        "Tensor h)");
    m.def(
        "lora_mlp_backward(Tensor grad_y, Tensor x, Tensor gate, Tensor up, Tensor h, Tensor[] w, SymInt[] wf, "
        "Tensor[] lora_as, Tensor[] lora_bs, float[] scalings, str activation, float dropout_p, Tensor? seeds, "
        "bool need_x, bool need_a, bool need_b, bool need_inner) -> (Tensor grad_x, Tensor grad_a, "
        "Tensor grad_down_a, Tensor[] grad_bs, Tensor product, Tensor grad_gate, Tensor grad_up)");
    m.def(
        "multi_lora_linear(Tensor x, Tensor[] w, SymInt[] wf, Tensor[] lora_as, Tensor[] lora_bs, float[] scalings, "
        "Tensor indices, Tensor? bias, float dropout_p, Tensor? seed) -> (Tensor y, Tensor h)");
    m.def(
        "multi_lora_linear_backward(Tensor grad_y, Tensor x, Tensor h, Tensor[] w, SymInt[] wf, Tensor[] lora_as, "
        "Tensor[] lora_bs, float[] scalings, Tensor indices, float dropout_p, Tensor? seed, bool need_x, "
        "int[] need_as, int[] need_bs) -> (Tensor grad_x, Tensor[] grad_as, Tensor[] grad_bs)");
    m.def("dora_linear_square_norm(Tensor[] w, SymInt[] wf) -> Tensor square_norm");
    m.def(
        "dora_linear_norm(Tensor[] w, SymInt[] wf, Tensor lora_a, Tensor lora_b, float scaling, Tensor square_norm, "
        "bool bf16) -> Tensor norm");
    m.def(
        "dora_linear_norm_backward(Tensor grad_norm, Tensor norm, Tensor[] w, SymInt[] wf, Tensor lora_a, "
        "Tensor lora_b, float scaling) -> (Tensor grad_a, Tensor grad_b)");
    m.def(
        "dora_linear(Tensor x, Tensor[] w, SymInt[] wf, Tensor lora_a, Tensor lora_b, Tensor scale, float scaling, "
        "Tensor? bias, float dropout_p, Tensor? seed, bool drop_base, bool need_z) -> (Tensor y, Tensor h, Tensor z)");
    m.def(
        "dora_linear_backward(Tensor grad_y, Tensor x, Tensor h, Tensor z, Tensor[] w, SymInt[] wf, Tensor lora_a, "
        "Tensor lora_b, Tensor scale, float scaling, float dropout_p, Tensor? seed, bool drop_base, bool need_x, "
        "bool need_a, bool need_b, bool need_scale) -> (Tensor grad_x, Tensor grad_a, Tensor grad_b, "
        "Tensor grad_scale)");
    m.def("ia3_linear(Tensor x, Tensor[] w, SymInt[] wf, Tensor scale, Tensor? bias, bool scale_input) -> Tensor y");
    m.def(
        "ia3_linear_backward(Tensor grad_y, Tensor x, Tensor? y, Tensor[] w, SymInt[] wf, Tensor scale, "
        "Tensor? bias, bool scale_input, bool need_x, bool need_scale) -> (Tensor grad_x, Tensor grad_scale)");
    m.def(
        "prompt_embedding(Tensor input_ids, Tensor embedding_weight, Tensor prompt, Tensor? prompt_ids, "
        "Tensor? attention_mask, Tensor? labels, Tensor? position_ids, Tensor? prompt_places) "
        "-> (Tensor inputs_embeds, Tensor attention_mask, Tensor labels, Tensor position_ids)");
    m.def(
        "prompt_embedding_backward(Tensor grad, Tensor input_ids, Tensor? prompt_ids, Tensor? prompt_places, "
        "SymInt vocabulary, SymInt prompts, ScalarType prompt_dtype, bool need_weight, bool need_prompt) "
        "-> (Tensor grad_weight, Tensor grad_prompt)");
    m.def(
        "bottleneck_adapter(Tensor x, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, "
        "str activation, float scaling, Tensor? residual) -> (Tensor y, Tensor z)");
    m.def(
        "bottleneck_adapter_backward(Tensor grad_y, Tensor x, Tensor z, Tensor down_weight, Tensor down_bias, "
        "Tensor up_weight, Tensor up_bias, str activation, float scaling, bool adds_x, bool need_x, "
        "bool need_down_weight, bool need_down_bias, bool need_up_weight, bool need_up_bias) -> (Tensor grad_x, "
        "Tensor grad_down_weight, Tensor grad_down_bias, Tensor grad_up_weight, Tensor grad_up_bias)");
    m.def(
        "prefix_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, "
        "Tensor? attn_mask, bool is_causal, float scale) -> (Tensor out, Tensor lse)");
    m.def(
        "prefix_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor prefix_key, "
        "Tensor prefix_value, Tensor? attn_mask, Tensor out, Tensor lse, bool is_causal, float scale, "
        "bool need_tokens, bool need_prefix) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
        "Tensor grad_prefix_key, Tensor grad_prefix_value)");
    m.def(
        "cross_entropy(Tensor logits, Tensor target, int ignore_index) -> (Tensor losses, Tensor top, Tensor log_sum)");
    m.def(
        "cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor target, Tensor top, Tensor log_sum, "
        "int ignore_index) -> Tensor grad_logits");
    m.def("cpu_tiles_run(str isa) -> int");
}
