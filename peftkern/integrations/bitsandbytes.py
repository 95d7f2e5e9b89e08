"""bitsandbytes' NF4 checkpoints: its state-dict names in and out. bitsandbytes itself is not imported.

A layer `fc` has, beside `fc.bias`, the entries (n elements, blocks = ceil(n / block size)):

| native             | bitsandbytes                           | tensor                                     |
|--------------------|----------------------------------------|--------------------------------------------|
| `weight`           | `weight`                               | codes, (ceil(n / 2), 1) uint8              |
| `absmax`           | `weight.absmax`                        | (blocks,) fp32, or uint8 when nested       |
| `nested_absmax`    | `weight.nested_absmax`                 | (ceil(blocks / 256),) fp32, nested only    |
| `nested_quant_map` | `weight.nested_quant_map`              | (256,) fp32, nested only                   |
| `offset`           | in the JSON                            | 0-d fp32, nested only                      |
| (fixed)            | `weight.quant_map`                     | (16,) fp32, the NF4 table                  |
| `nf4_format`       | `weight.quant_state.bitsandbytes__nf4` | 6 int64; bytes of a JSON object, uint8     |

bitsandbytes' `weight` may have another dtype (its quant_storage): the same bytes, fewer and wider elements.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nf4 import NF4Weight
from peftkern.ops.nf4_quantize import BLOCK_SIZES, NESTED_BLOCK_SIZE, codebook

# In the order of NF4Weight.tensors.
PART_NAMES = ("weight", "absmax", "nested_absmax", "nested_quant_map", "offset")
FORMAT_KEY = "nf4_format"
FORMAT_VERSION = 1
QUANT_STATE_KEY = "weight.quant_state.bitsandbytes__nf4"
_BNB_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# The position is what `nf4_format` stores: append only.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
# Writers of other releases may have rounded the table differently in its last bit.
_TABLE_TOLERANCE = 1e-6


def format_values(shape: torch.Size, dtype: torch.dtype, block_size: int, nested: bool) -> list[int]:
    """What `nf4_format` holds: version, out, in, block size, dtype's position in DTYPES, nested."""
    return [FORMAT_VERSION, shape[0], shape[1], block_size, DTYPES.index(dtype), int(nested)]


def native_entries(q: NF4Weight) -> dict[str, Tensor]:
    """`q` under the native names, `nf4_format` included."""
    values = format_values(q.shape, q.dtype, q.block_size, q.nested)
    entries = {name: part for name, part in zip(PART_NAMES, q.tensors) if part is not None}
    return {**entries, FORMAT_KEY: torch.tensor(values, dtype=torch.int64, device=q.device)}


def bnb_keys(state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of the layer at `prefix` that only bitsandbytes writes; none if another library did."""
    parts = [f"{prefix}weight.{name}" for name in _BNB_PARTS]
    return [key for key in state_dict if key in parts or key.startswith(prefix + "weight.quant_state.")]


def _entry(state_dict: Mapping[str, Any], key: str) -> Tensor:
    if key not in state_dict:
        raise ValueError(f'"{key}" is missing')
    value = state_dict[key]
    if not isinstance(value, Tensor):
        raise ValueError(f'"{key}" must be a Tensor, got {type(value).__name__}')
    return value


def check_entry(key: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError naming `key` unless `value` has this dtype and shape, and values."""
    if value.dtype != dtype:
        raise ValueError(f'"{key}" must be {dtype}, got {value.dtype}')
    if value.shape != shape:
        raise ValueError(f'"{key}" must have shape {list(shape)}, got {list(value.shape)}')
    if value.is_meta:
        raise ValueError(f'"{key}" is on the meta device, it has no values')


def check_parts(q: NF4Weight, keys: Mapping[str, str]) -> None:
    """Raises ValueError unless every part of `q` has the dtype and size that its shape and block size ask for.

    Args:
        q: the weight as read from a file.
        keys: native name -> the key to name in the message.
    """
    blocks = -(-q.numel() // q.block_size)
    check_entry(keys["weight"], q.codes, torch.uint8, ((q.numel() + 1) // 2, 1))
    check_entry(keys["absmax"], q.absmax, torch.uint8 if q.nested else torch.float32, (blocks,))
    if q.nested_absmax is not None and q.nested_quant_map is not None and q.offset is not None:
        nested_blocks = -(-blocks // NESTED_BLOCK_SIZE)
        check_entry(keys["nested_absmax"], q.nested_absmax, torch.float32, (nested_blocks,))
        check_entry(keys["nested_quant_map"], q.nested_quant_map, torch.float32, (256,))
        check_entry(keys["offset"], q.offset, torch.float32, ())


def _field(state: dict[str, Any], key: str, name: str, kind: type) -> Any:
    if name not in state:
        raise ValueError(f'"{key}" has no {name!r}')
    value = state[name]
    if type(value) is not kind:
        raise ValueError(f'"{key}": {name!r} must be {kind.__name__}, got {value!r}')
    return value


def _unpack_quant_state(packed: Tensor, key: str) -> dict[str, Any]:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f'"{key}" must be the uint8 bytes of a JSON object, got {packed.dtype} {list(packed.shape)}')
    if packed.is_meta:
        raise ValueError(f'"{key}" is on the meta device, it has no values')
    try:
        state = json.loads(bytes(packed.tolist()).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f'"{key}" is not JSON: {error}') from error
    if not isinstance(state, dict):
        raise ValueError(f'"{key}" must be a JSON object, got {type(state).__name__}')
    return state


def _check_quant_map(table: Tensor, key: str) -> None:
    check_entry(key, table, torch.float32, (16,))
    if not torch.allclose(table.cpu(), codebook(), rtol=0, atol=_TABLE_TOLERANCE):
        raise ValueError(f'"{key}" is not the NF4 table')


def read_bnb(state_dict: Mapping[str, Any], prefix: str = "") -> NF4Weight:
    """Reads one layer's weight under bitsandbytes' names, every part checked. No byte is changed or copied.

    Args:
        state_dict: holds `<prefix>weight`, `<prefix>weight.absmax`, ...; others are ignored.
        prefix: of the layer, with its dot ("model.fc.").

    Raises:
        ValueError: an entry is missing, corrupt or of the wrong dtype or shape (named), or the format is not NF4.
    """
    keys = {name: f"{prefix}weight.{name}" for name in _BNB_PARTS}
    keys["weight"], keys["offset"] = prefix + "weight", prefix + QUANT_STATE_KEY
    state_key = prefix + QUANT_STATE_KEY
    if state_key not in state_dict:
        others = [key for key in state_dict if key.startswith(f"{prefix}weight.quant_state.")]
        if others:
            raise ValueError(f'"{others[0]}" is not NF4; only "{state_key}" can be read')
    state = _unpack_quant_state(_entry(state_dict, state_key), state_key)

    quant_type = _field(state, state_key, "quant_type", str)
    if quant_type != "nf4":
        raise ValueError(f"\"{state_key}\": quant_type must be 'nf4', got {quant_type!r}")
    block_size = _field(state, state_key, "blocksize", int)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f'"{state_key}": blocksize must be one of {BLOCK_SIZES}, got {block_size}')
    shape = _field(state, state_key, "shape", list)
    if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f'"{state_key}": shape must be [out, in], got {shape}')
    dtype_name = _field(state, state_key, "dtype", str)
    if dtype_name not in _DTYPE_BY_NAME:
        raise ValueError(f'"{state_key}": dtype must be one of {", ".join(_DTYPE_BY_NAME)}, got {dtype_name!r}')

    _check_quant_map(_entry(state_dict, keys["quant_map"]), keys["quant_map"])
    codes, absmax = _entry(state_dict, keys["weight"]), _entry(state_dict, keys["absmax"])
    nested_absmax = nested_quant_map = offset = None
    nested_keys = (keys["nested_absmax"], keys["nested_quant_map"])
    if any(key in state_dict for key in nested_keys) or "nested_offset" in state or "nested_blocksize" in state:
        nested_absmax, nested_quant_map = (_entry(state_dict, key) for key in nested_keys)
        nested_block_size = _field(state, state_key, "nested_blocksize", int)
        if nested_block_size != NESTED_BLOCK_SIZE:
            raise ValueError(f'"{state_key}": nested_blocksize must be {NESTED_BLOCK_SIZE}, got {nested_block_size}')
        value = _field(state, state_key, "nested_offset", float)
        if not math.isfinite(value):
            raise ValueError(f'"{state_key}": nested_offset must be finite, got {value}')
        offset = torch.tensor(value, dtype=torch.float32, device=absmax.device)
    # quant_storage: the same bytes in wider elements.
    if codes.dtype in (torch.bfloat16, torch.float16, torch.float32):
        codes = codes.contiguous().view(torch.uint8).reshape(-1, 1)
    dtype = _DTYPE_BY_NAME[dtype_name]
    q = NF4Weight(codes, absmax, nested_absmax, nested_quant_map, offset, torch.Size(shape), dtype, block_size)
    check_parts(q, keys)
    return q


def read_native(state_dict: Mapping[str, Any], prefix: str = "") -> NF4Weight:
    """Reads one layer's weight under the native names, every part checked. No byte is changed or copied.

    Raises:
        ValueError: an entry is missing or of the wrong dtype or shape (named), or the format is unknown.
    """
    key = prefix + FORMAT_KEY
    packed = _entry(state_dict, key)
    check_entry(key, packed, torch.int64, (6,))
    version, rows, columns, block_size, dtype, nested = packed.tolist()
    if version != FORMAT_VERSION:
        raise ValueError(f'"{key}": version must be {FORMAT_VERSION}, got {version}')
    if rows < 1 or columns < 1 or block_size not in BLOCK_SIZES or not 0 <= dtype < len(DTYPES) or nested not in (0, 1):
        raise ValueError(f'"{key}" is corrupt: {packed.tolist()}')
    codes, absmax = (_entry(state_dict, prefix + name) for name in PART_NAMES[:2])
    nested_absmax, nested_quant_map, offset = (
        _entry(state_dict, prefix + name) if nested else None for name in PART_NAMES[2:]
    )
    shape = torch.Size((rows, columns))
    q = NF4Weight(codes, absmax, nested_absmax, nested_quant_map, offset, shape, DTYPES[dtype], block_size)
    check_parts(q, {name: prefix + name for name in PART_NAMES})
    return q


def bnb_entries(q: NF4Weight, prefix: str = "") -> dict[str, Tensor]:
    """One layer's weight under bitsandbytes' names, as `Linear4bit.state_dict()` writes it (quant_storage uint8).

    Raises:
        RuntimeError: `q` is on the meta device.
    """
    if q.absmax.is_meta:
        raise RuntimeError(f'bnb_state_dict: "{prefix}weight" is on the meta device, it has no bytes to save')
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    entries = {"weight": q.codes, "weight.absmax": q.absmax, "weight.quant_map": codebook().to(q.device, copy=True)}
    if q.nested_absmax is not None and q.nested_quant_map is not None and q.offset is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": q.offset.item(),
        }
        entries |= {"weight.nested_absmax": q.nested_absmax, "weight.nested_quant_map": q.nested_quant_map}
    entries[QUANT_STATE_KEY] = torch.tensor(list(json.dumps(state).encode("utf-8")), dtype=torch.uint8, device=q.device)
    return {prefix + name: value for name, value in entries.items()}


def bnb_state_dict(model: nn.Module, state_dict: Mapping[str, Any] | None = None) -> OrderedDict[str, Any]:
    """A model's state dict with every NF4 layer under bitsandbytes' names; all other entries unchanged.

    `bitsandbytes.nn.Params4bit.from_prequantized`, transformers and our `load_state_dict` read it.

    Args:
        model: any module; a single NF4Linear too.
        state_dict: to convert instead of `model.state_dict()`, for one that was gathered or filtered.

    Raises:
        ValueError: an NF4 layer's entries are incomplete.
        RuntimeError: an NF4 layer is on the meta device.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    prefixes = [key.removesuffix(FORMAT_KEY) for key in state_dict if key.rpartition(".")[2] == FORMAT_KEY]
    layers: dict[str, dict[str, Tensor]] = {}
    for prefix in prefixes:
        if state_dict[prefix + FORMAT_KEY].is_meta:
            raise RuntimeError(f'bnb_state_dict: "{prefix}weight" is on the meta device, it has no bytes to save')
        layers[prefix] = bnb_entries(read_native(state_dict, prefix), prefix)
    native = {prefix + name for prefix in prefixes for name in (*PART_NAMES, FORMAT_KEY)}
    converted: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        prefix = key.rpartition(".")[0]
        prefix = prefix + "." if prefix else ""
        if key == prefix + "weight" and prefix in layers:
            converted.update(layers[prefix])
        elif key not in native:
            converted[key] = value
    return converted
