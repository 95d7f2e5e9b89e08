"""peftkern: fused kernels for parameter-efficient fine-tuning, as torch functions and modules."""

from peftkern import nn
from peftkern.blocks import fuse_blocks, unfuse_blocks
from peftkern.explain import explain, report
from peftkern.model import add_lora, load_adapter, quantize, save_adapter
from peftkern.nf4 import NF4Weight
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.lora_mlp import lora_mlp
from peftkern.ops.lora_qkv import lora_qkv
from peftkern.ops.nf4_dequantize import nf4_dequantize
from peftkern.ops.nf4_linear import nf4_linear
from peftkern.ops.nf4_quantize import nf4_quantize

__version__ = "0.1.0"

__all__ = [
    "NF4Weight",
    "add_lora",
    "explain",
    "fuse_blocks",
    "load_adapter",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "nn",
    "quantize",
    "report",
    "save_adapter",
    "unfuse_blocks",
]
