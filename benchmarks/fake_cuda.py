"""What a step does on a GPU, op by op, without one: torch's ops on fake CUDA tensors, counted.

Every op's bytes are those of its operands and results, each once; views are free. A roofline gives an op the longest of
its operations at 75 % of the chip's peak for their dtype, its bytes at 80 % of the bandwidth, and 4 us for a launch.
Nothing here is a measurement: no GPU runs anything.

`load` has to run before torch is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).parents[1] / "tests" / "cpp" / "fake_cuda.cpp"
FOLDER = Path(__file__).parents[1] / "build" / "fake-cuda"


def load() -> None:
    """Compiles the fake device, if it has not been, and loads it. torch must not have been imported yet."""
    assert "torch" not in sys.modules, "fake_cuda: load before torch is imported"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    FOLDER.mkdir(parents=True, exist_ok=True)
    library = FOLDER / "fake_cuda.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            made = Path(folder) / library.name
            libraries = torch_folder / "lib"
            command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", str(SOURCE)]
            command += ["-o", str(made), f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
            subprocess.run(command, check=True)
            made.replace(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class Chip(NamedTuple):
    """Of a GPU's data sheet: dense TFLOP/s in fp32 (no TF32, torch's default) and in 16 bits, and TB/s."""

    fp32: float
    half: float
    bandwidth: float


CHIPS = {
    "H200": Chip(67, 989, 4.8),
    "A100": Chip(19.5, 312, 2.04),
    "RTX 4090": Chip(82.6, 165, 1.01),
}
COMPUTE_SHARE, BANDWIDTH_SHARE, LAUNCH_SECONDS = 0.75, 0.8, 4e-6
# Ops that launch nothing.
FREE = {
    *("view", "t", "transpose", "detach", "_unsafe_view", "as_strided", "expand", "permute", "select", "squeeze"),
    *("unsqueeze", "slice", "alias", "lift_fresh", "reshape", "unbind", "split", "split_with_sizes", "view_as"),
    *("_reshape_alias", "chunk", "unfold", "flatten", "empty", "new_empty", "empty_like", "empty_strided", "narrow"),
    *("new_empty_strided", "resize_", "is_pinned"),
}


class Row(NamedTuple):
    """An op as it ran: its name, the shapes and dtypes of its tensors, bytes and operations.

    `wide` is the number of elements of its largest result in fp32 or in a wider type.
    """

    phase: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nbytes: int
    flops: int
    is_half: bool
    wide: int


@dataclass
class Counts:
    """Of one forward and backward.

    Attributes:
        rows: every op that launches something.
        saved: bytes saved for backward, beyond parameters and x.
        peak: bytes at the most, beyond what was there before.
    """

    rows: list[Row] = field(default_factory=list)
    saved: int = 0
    peak: int = 0

    @property
    def launches(self) -> int:
        return len(self.rows)

    @property
    def largest_wide(self) -> int:
        """Elements of the largest result in fp32 or in a wider type."""
        return max((row.wide for row in self.rows), default=0)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    def seconds(self, chip: Chip) -> float:
        """The roofline's time."""
        peaks = {True: chip.half, False: chip.fp32}
        return sum(
            max(
                row.flops / (COMPUTE_SHARE * peaks[row.is_half] * 1e12),
                row.nbytes / (BANDWIDTH_SHARE * chip.bandwidth * 1e12),
                LAUNCH_SECONDS,
            )
            for row in self.rows
        )


def shown(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


@contextmanager
def fake_cuda() -> Iterator[Any]:
    """The mode in which tensors on "cuda" are fake."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def faked(module: Any) -> Any:
    """A module made on the CPU, with fake CUDA tensors in place of its own; inside `fake_cuda`."""
    import torch

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = torch.nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = fake(buffer)
    return module


def counted(
    function: Callable[..., Any], *inputs: Any, tensors: Any = (), expand: dict[Any, Callable[..., Any]] | None = None
) -> Counts:
    """Runs a function of fake tensors forward and backward, under torch's autocast where that is on.

    `tensors` are there before (parameters); `expand` has what stands for an op of another library that hides several.
    """
    import torch

    counter = _counter(expand or {})
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage._cdata, storage.nbytes())
        return tensor

    present = [t for t in (*inputs, *tensors) if isinstance(t, torch.Tensor)]
    counter.begin(present)
    own = {t.untyped_storage()._cdata for t in present}
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = function(*inputs)
        counter.counts.saved = sum(size for key, size in saved.items() if key not in own)
        counter.phase = "backward"
        enabled = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", False)
        try:
            y.backward(torch.empty_like(y))
        finally:
            torch.set_autocast_enabled("cuda", enabled)
    counter.counts.peak = counter.peak - counter.start
    return counter.counts


def _counter(expand: dict[Any, Callable[..., Any]]) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    def tensors_of(values: Any) -> list[torch.Tensor]:
        return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]

    def size(tensor: torch.Tensor) -> int:
        elements = 1
        for extent, stride in zip(tensor.shape, tensor.stride()):
            elements *= extent if stride else 1  # what is broadcast is read once
        return elements * tensor.element_size()

    def flops_of(name: str, inputs: list[torch.Tensor], func: Any, args: Any, kwargs: Any, out: Any) -> int:
        if name in ("mm", "addmm", "addmm_"):
            first, second = inputs[-2:] if name != "mm" else inputs[:2]
            return 2 * first.shape[0] * first.shape[1] * second.shape[1]
        packet = func._overloadpacket
        return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts, self.phase = Counts(), "forward"
            self.live = self.peak = self.start = 0
            self.seen: dict[int, int] = {}

        def begin(self, present: list[torch.Tensor]) -> None:
            for tensor in present:
                self.track(tensor)
            self.start = self.peak = self.live

        def track(self, tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes()
            if key in self.seen:
                return
            self.seen[key] = nbytes
            self.live += nbytes
            self.peak = max(self.peak, self.live)

            def gone() -> None:
                self.live -= self.seen.pop(key, 0)

            weakref.finalize(storage, gone)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in expand:
                with self:
                    return expand[func](*args, **kwargs)
            out = func(*args, **kwargs)
            namespace, _, name = func._schema.name.partition("::")
            if namespace == "prim":
                return out
            inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
            for tensor in outputs:
                self.track(tensor)
            if name in FREE:
                return out
            # In place or into a given result: read as an operand only where it is one.
            given = tensors_of(kwargs.get("out"))
            operands = [t for t in inputs if not any(t is each for each in given)]
            nbytes = sum(map(size, operands)) + sum(map(size, outputs))
            flops = flops_of(name, operands, func, args, kwargs, out)
            self.counts.rows.append(
                Row(
                    self.phase,
                    name if namespace == "aten" else f"{namespace}::{name}",
                    tuple(map(shown, operands)),
                    tuple(map(shown, outputs)),
                    nbytes,
                    flops,
                    bool(operands) and operands[0].dtype in (torch.bfloat16, torch.float16),
                    max((t.numel() for t in outputs if t.element_size() >= 4), default=0),
                )
            )
            return out

    return Counter()
