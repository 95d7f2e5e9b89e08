"""peftkern: fused kernels for parameter-efficient fine-tuning, as torch functions and modules."""

from typing import TYPE_CHECKING, Any

from peftkern import nn
from peftkern.batch import adapters_for_batch
from peftkern.blocks import fuse_blocks, unfuse_blocks
from peftkern.explain import explain, report
from peftkern.integrations.bnb_layers import from_bnb, to_bnb
from peftkern.integrations.peft import accelerate, restore
from peftkern.loraplus import loraplus_groups
from peftkern.model import quantize
from peftkern.nf4 import NF4Weight
from peftkern.ops.bottleneck_adapter import bottleneck_adapter
from peftkern.ops.cross_entropy import cross_entropy
from peftkern.ops.dora_linear import dora_linear
from peftkern.ops.ia3_linear import ia3_linear
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.lora_mlp import lora_mlp
from peftkern.ops.lora_qkv import lora_qkv
from peftkern.ops.multi_lora_linear import multi_lora_linear
from peftkern.ops.nf4_dequantize import nf4_dequantize
from peftkern.ops.nf4_linear import nf4_linear
from peftkern.ops.nf4_quantize import nf4_quantize
from peftkern.ops.prefix_attention import prefix_attention
from peftkern.ops.prompt_embedding import prompt_embedding
from peftkern.tuning import (
    add_lora,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    load,
    load_adapter,
    merge,
    save,
    save_adapter,
    set_adapter,
    tune,
    unmerge,
)

if TYPE_CHECKING:
    from peftkern.integrations.transformers import NF4Config as NF4Config

__version__ = "0.1.0"

__all__ = [
    "NF4Weight",
    "accelerate",
    "adapters_for_batch",
    "add_lora",
    "bottleneck_adapter",
    "cross_entropy",
    "delete_adapter",
    "disable_adapters",
    "dora_linear",
    "enable_adapters",
    "explain",
    "from_bnb",
    "fuse_blocks",
    "ia3_linear",
    "load",
    "load_adapter",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "loraplus_groups",
    "merge",
    "multi_lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "nn",
    "prefix_attention",
    "prompt_embedding",
    "quantize",
    "report",
    "restore",
    "save",
    "save_adapter",
    "set_adapter",
    "to_bnb",
    "tune",
    "unfuse_blocks",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """NF4Config subclasses transformers' class, so that transformers is imported with it: only where it is used."""
    if name == "NF4Config":
        from peftkern.integrations.transformers import NF4Config

        return NF4Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
