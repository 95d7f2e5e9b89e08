"""Makes the files in tests/golden/adapterhub: small models with bottleneck adapters of the `adapters` library, and what
they compute.

It needs an older transformers than peftkern's tests, so `make adapters-golden` runs it in an environment of its own.
With `--check DIR` it makes nothing but loads DIR/<case>, adapters that peftkern wrote for the same models, into that
library, and compares what it computes with the files.
"""

import argparse
from pathlib import Path

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

ROOT = Path(__file__).parent / "adapterhub"
WIDTH = 16
BERT = BertConfig(
    vocab_size=24, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
    max_position_embeddings=12, hidden_act="gelu",
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=24, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=20, max_position_embeddings=12,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=24, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=12)
# Case -> model, its configuration, the adapter's, and whether to write safetensors.
CASES = {
    "bert_double_seq": (BertModel, BERT, adapters.DoubleSeqBnConfig(reduction_factor=4), False),
    "llama_parallel": (
        LlamaModel,
        LLAMA,
        adapters.ParBnConfig(mh_adapter=True, reduction_factor=2, leave_out=[1]),
        True,
    ),
    "llama_learned_scaling": (
        LlamaModel,
        LLAMA,
        adapters.DoubleSeqBnConfig(reduction_factor=3, non_linearity="gelu", scaling="learned"),
        True,
    ),
    "gpt2_output_only": (
        GPT2Model,
        GPT2,
        adapters.BnConfig(mh_adapter=False, output_adapter=True, reduction_factor=8, non_linearity="gelu_new"),
        False,
    ),
}


def make(case: str) -> None:
    """Writes one case."""
    kind, config, adapter, use_safetensors = CASES[case]
    torch.manual_seed(0)
    directory = ROOT / case
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    input_ids = torch.randint(24, (2, 7))
    adapters.init(model)
    model.add_adapter("task", config=adapter)
    model.set_active_adapters("task")
    for name, parameter in model.named_parameters():
        if ".adapters.task." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_adapter(str(directory), "task", use_safetensors=use_safetensors)
    (directory / "head_config.json").unlink(missing_ok=True)
    config.to_json_file(directory / "config.json")
    save_file(base, directory / "base.safetensors")
    save_file(
        {"input_ids": input_ids, "with_adapter": output(model, input_ids), "without": without(model, input_ids)},
        directory / "expected.safetensors",
    )


def output(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The last hidden state."""
    with torch.no_grad():
        return model(input_ids).last_hidden_state.clone()


def without(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The same of the base model."""
    model.set_active_adapters(None)
    return output(model, input_ids)


def check(case: str, directory: Path) -> None:
    """`directory` holds this case's adapter as peftkern wrote it."""
    kind, config, _, _ = CASES[case]
    model = kind(config).eval()
    model.load_state_dict(load_file(ROOT / case / "base.safetensors"))
    expected = load_file(ROOT / case / "expected.safetensors")
    adapters.init(model)
    info: dict = {}
    model.load_adapter(str(directory), load_as="other", set_active=True, loading_info=info)
    assert not info.get("missing_keys") and not info.get("unexpected_keys"), info
    torch.testing.assert_close(output(model, expected["input_ids"]), expected["with_adapter"])
    print(f"{case}: as expected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    for case in CASES:
        if arguments.check:
            check(case, arguments.check / case)
        else:
            make(case)


if __name__ == "__main__":
    main()
