"""Drop-in modules: parameters and one op call each."""

from peftkern.nn.adapter import AdaptedSublayer, BottleneckAdapter
from peftkern.nn.attention import LoRAAttention
from peftkern.nn.dora_linear import DoRALinear
from peftkern.nn.ia3_linear import IA3Linear
from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.mlp import LoRAMLP
from peftkern.nn.nf4_linear import NF4Linear
from peftkern.nn.prefix import Prefix
from peftkern.nn.prompt import PromptEmbedding, PromptEncoder

__all__ = [
    "AdaptedSublayer",
    "BottleneckAdapter",
    "DoRALinear",
    "IA3Linear",
    "LoRAAttention",
    "LoRALinear",
    "LoRAMLP",
    "NF4Linear",
    "Prefix",
    "PromptEmbedding",
    "PromptEncoder",
]
