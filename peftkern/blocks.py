"""Whole models: attention and MLP blocks that run their projections together."""

from torch import nn

from peftkern._modules import check_model
from peftkern.nn._fused_block import FusedBlock
from peftkern.nn.attention import LoRAAttention
from peftkern.nn.mlp import LoRAMLP

_QKV = ("q_proj", "k_proj", "v_proj")
# transformers' classes whose forward projects one input. GPT-2's c_attn is one layer already.
_ATTENTIONS = {
    "LlamaAttention": _QKV,
    "MistralAttention": _QKV,
    "Qwen2Attention": _QKV,
    "GemmaAttention": _QKV,
    "BertSelfAttention": ("query", "key", "value"),
}
_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "GemmaMLP")


def fuse_blocks(model: nn.Module) -> nn.Module:
    """Makes LoRAAttention and LoRAMLP of a transformers model's blocks, in place: one op for q, k, v, one for an MLP.

    Llama, Mistral, Qwen2 and Gemma, and BERT's self-attention; others by `nn.LoRAAttention.from_block` and
    `nn.LoRAMLP.from_block`. Before or after `add_lora`: what a block can run together is decided at every call.

    Args:
        model: any module that holds such blocks.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: not a module, one that another adapter library has wrapped, or one without such blocks.
    """
    check_model("fuse_blocks", model)
    if not exchange_blocks(model):
        names = ", ".join((*_ATTENTIONS, *_MLPS))
        raise ValueError(f"fuse_blocks: {type(model).__name__} has no block to fuse; these are: {names}")
    return model


def exchange_blocks(model: nn.Module) -> int:
    """Changes the blocks that are known, in place; returns how many."""
    blocks = [module for module in model.modules() if not isinstance(module, FusedBlock)]
    attentions = [block for block in blocks if type(block).__name__ in _ATTENTIONS]
    mlps = [block for block in blocks if type(block).__name__ in _MLPS]
    for block in attentions:
        LoRAAttention.from_block(block, _ATTENTIONS[type(block).__name__])
    for block in mlps:
        LoRAMLP.from_block(block)
    return len(attentions) + len(mlps)


def unfuse_blocks(model: nn.Module) -> nn.Module:
    """Undoes `fuse_blocks` and every `from_block`, in place.

    Args:
        model: any module.

    Returns:
        The same model.
    """
    for module in list(model.modules()):
        if isinstance(module, FusedBlock):
            module.undo()
    return model
