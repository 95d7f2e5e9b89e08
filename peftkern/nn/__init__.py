"""Drop-in modules: parameters and one op call each."""

from peftkern.nn.attention import LoRAAttention
from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.mlp import LoRAMLP
from peftkern.nn.nf4_linear import NF4Linear

__all__ = ["LoRAAttention", "LoRALinear", "LoRAMLP", "NF4Linear"]
