"""Drop-in modules: parameters and one op call each."""

from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.nf4_linear import NF4Linear

__all__ = ["LoRALinear", "NF4Linear"]
