"""The CUDA kernels' own source on the CPU: compiled by the C++ compiler, on the emulated device of tests/cpp/emulation.

Memory that kernels see ends at a page that may not be touched, so that a read or a write past it ends the process.
"""

import ctypes
import mmap
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, c_bool, c_double, c_float, c_int, c_int64, c_uint8, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from peftkern.nf4 import NF4Weight

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SOURCES = (
    "csrc/cuda/nf4_quantize.cu",
    "csrc/cuda/nf4_dequantize.cu",
    "csrc/cuda/nf4_linear_decode.cu",
    "csrc/cuda/lora_linear_down.cu",
    "csrc/cuda/split_sum.cu",
    "tests/cpp/cuda_host.cpp",
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
POISON = 0xFF  # NaN in fp32, bf16 and fp16


class View(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("absmax", c_void_p),
        ("nested_absmax", c_void_p),
        ("nested_quant_map", c_void_p),
        ("offset", c_void_p),
        ("block_shift", c_int),
    )


class Epilogue(Structure):
    _fields_ = (
        ("bias", c_void_p),
        ("bias_dtype", c_int),
        ("row_scale", c_void_p),
        ("h", c_void_p),
        ("lora_b", c_void_p),
        ("lora_b_dtype", c_int),
        ("rank", c_int),
        ("h_scale", c_float),
    )


class Quantize(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("dtype", c_int),
        ("numel", c_int64),
        ("block_shift", c_int),
        ("codes", c_void_p),
        ("absmax", c_void_p),
    )


class QuantizeAbsmax(Structure):
    _fields_ = (
        ("absmax", c_void_p),
        ("count", c_int64),
        ("quant_map", c_void_p),
        ("offset", c_void_p),
        ("bytes", c_void_p),
        ("nested_absmax", c_void_p),
    )


class Dequantize(Structure):
    _fields_ = (("weight", View), ("numel", c_int64), ("out", c_void_p), ("dtype", c_int))


class Linear(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("rows", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int),
        ("weight", View),
        ("epilogue", Epilogue),
        ("y", c_void_p),
        ("splits", c_int),
        ("partials", c_void_p),
    )


class LoraDown(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("rows", c_int64),
        ("in_features", c_int64),
        ("dtype", c_int),
        ("lora_a", c_void_p),
        ("lora_a_dtype", c_int),
        ("rank", c_int),
        ("h", c_void_p),
    )


class Plan(Structure):
    _fields_ = tuple((name, c_int) for name in ("row_tiles", "warps", "splits", "split_groups", "ctas"))


class GemmPlan(Structure):
    _fields_ = tuple((name, c_int) for name in ("tokens", "slices", "slice_steps"))


class Traits(Structure):
    _fields_ = (
        ("compute_capability", c_int),
        ("sm_count", c_int),
        ("shared_bytes", c_int),
        ("l2_bytes", c_int64),
        ("clock_khz", c_int),
        ("memory_clock_khz", c_int),
        ("bus_bits", c_int),
    )


class Call(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("dtype", c_int),
        ("block_size", c_int64),
        ("nested", c_bool),
        ("backward", c_bool),
        ("has_gemm", c_bool),
    )


LAUNCHERS = {
    "peftkern_cuda_nf4_quantize": (POINTER(Quantize), c_void_p),
    "peftkern_cuda_nf4_quantize_absmax": (POINTER(QuantizeAbsmax), c_void_p),
    "peftkern_cuda_nf4_dequantize": (POINTER(Dequantize), c_void_p),
    "peftkern_cuda_nf4_linear_decode": (POINTER(Linear), POINTER(Plan), c_int, c_void_p),
    "peftkern_cuda_lora_down": (POINTER(LoraDown), c_void_p),
}
HOST_FUNCTIONS = {
    "host_decode_plan": (Plan, (c_int64, c_int64, c_int64, Traits)),
    "host_choose_kernel": (c_int, (Call, Traits)),
    "host_gemm_plan": (GemmPlan, (Call, Traits)),
    "host_row_stride": (c_int64, (c_int64, c_int64, c_int64, c_int64)),
    "host_set_device": (None, (c_int,)),
    "host_last_was_programmatic": (c_bool, ()),
    "host_pair_address": (c_uint32, (c_uint32, c_int, c_int, c_int)),
    "host_pair_table": (None, (c_void_p, c_int, c_bool)),
    "host_lane_table_address": (c_uint32, (c_uint32, c_int, c_int)),
    "host_nested_scale": (c_float, (c_float, c_float, c_float)),
    "host_nearest_codes": (None, (POINTER(c_float), c_int64, POINTER(c_uint8))),
    "host_convert": (None, (c_void_p, c_int64, c_int, c_int, c_void_p)),
    "host_unscale": (c_double, (c_int,)),
}


@cache
def library() -> ctypes.CDLL:
    """The kernels as a library of this machine, compiled once in a process."""
    with tempfile.TemporaryDirectory() as directory:
        return _build(Path(directory))


def _build(directory: Path) -> ctypes.CDLL:
    assert COMPILER

    def compiled(source: str) -> Path:
        target = directory / f"{Path(source).stem}.o"
        includes = ["-Itests/cpp/emulation", "-Icsrc"]
        command = [COMPILER, *FLAGS, *includes, "-x", "c++", "-c", source, "-o", str(target)]
        subprocess.run(command, cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, SOURCES))
    target = directory / "kernels.so"
    subprocess.run([COMPILER, "-shared", *map(str, objects), "-o", str(target)], check=True)
    kernels = ctypes.CDLL(str(target))
    for name, arguments in LAUNCHERS.items():
        getattr(kernels, name).argtypes = arguments
    for name, (result, arguments) in HOST_FUNCTIONS.items():
        getattr(kernels, name).restype, getattr(kernels, name).argtypes = result, arguments
    return kernels


class Memory:
    """A tensor's copy, or room for one full of poison, that ends within 15 bytes of a page that may not be touched."""

    def __init__(self, content: Tensor | None, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.uint8) -> None:
        if content is not None:
            shape, dtype = tuple(content.shape), content.dtype
        self.shape, self.dtype = shape, dtype
        self.nbytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        room = -(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.pages = mmap.mmap(-1, room + mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        protected = ctypes.CDLL(None, use_errno=True).mprotect(c_void_p(begin + room), mmap.PAGESIZE, 0)
        assert protected == 0, os.strerror(ctypes.get_errno())
        self.address = begin + (room - self.nbytes) // 16 * 16
        if content is None:
            ctypes.memset(self.address, POISON, self.nbytes)
        elif self.nbytes:
            dense = content.contiguous()
            ctypes.memmove(self.address, dense.data_ptr(), self.nbytes)

    def tensor(self) -> Tensor:
        """What is there now."""
        copy = bytearray(ctypes.string_at(self.address, self.nbytes))
        return torch.frombuffer(copy, dtype=self.dtype).view(self.shape) if copy else torch.empty(self.shape)


def view_of(q: NF4Weight) -> tuple[View, list[Memory]]:
    """The weight's bytes as kernels see them, and the memory that must outlive them."""
    memories = [None if part is None else Memory(part) for part in q.tensors]
    addresses = [None if memory is None else memory.address for memory in memories]
    view = View(*addresses, q.block_size.bit_length() - 1)
    return view, [memory for memory in memories if memory is not None]


def launched(error: int) -> None:
    """Raises what the launcher returned."""
    assert error == 0, f"the launcher returned {error}"
