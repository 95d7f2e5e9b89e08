"""Loads the native ops into torch.ops.peftkern. Nothing else happens at import."""

from pathlib import Path

import torch

import peftkern._caps as caps

torch.ops.load_library(Path(__file__).parent / "_C.abi3.so")

ops = torch.ops.peftkern

__all__ = ["caps", "ops"]
