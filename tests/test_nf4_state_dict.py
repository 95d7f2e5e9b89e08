"""NF4Linear's state dicts: its own names, bitsandbytes' and a float weight; what is refused changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_layers import FLAT_PARTS, IN, OUT, PARTS, assert_entries, make, snapshot
from torch import nn

from peftkern import nf4_quantize
from peftkern.integrations.bitsandbytes import QUANT_STATE_KEY, bnb_state_dict, native_entries
from peftkern.nn import NF4Linear

NESTED = pytest.mark.parametrize("double_quant", [False, True], ids=["flat", "nested"])
ASSIGN = pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
Entries = dict[str, Any]


def edit_quant_state(entries: Entries, **changes: Any) -> None:
    """Replaces fields of the JSON; one set to None is removed."""
    state = json.loads(bytes(entries[QUANT_STATE_KEY].tolist()))
    state = {key: value for key, value in (state | changes).items() if value is not None}
    entries[QUANT_STATE_KEY] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


# What loads


@pytest.mark.parametrize(
    "device, assign", [("cpu", False), ("cpu", True), ("meta", True)], ids=["copy", "assign", "assign to meta"]
)
@pytest.mark.parametrize("names", ["native", "bitsandbytes", "float"])
@NESTED
def test_every_kind_of_dict_loads(double_quant, names, device, assign, seed):
    linear = nn.Linear(IN, OUT)
    source = NF4Linear.from_linear(linear, double_quant=double_quant)
    entries = {
        "native": source.state_dict,
        "bitsandbytes": lambda: bnb_state_dict(source),
        "float": linear.state_dict,
    }[names]()
    before = {key: value.clone() for key, value in entries.items()}
    layer = make(device=device, double_quant=double_quant)
    assert layer.load_state_dict(entries, assign=assign) == ([], [])
    assert_entries(layer.state_dict(), snapshot(source))
    assert_entries(entries, before)
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad and layer.bias.requires_grad
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_float_weight_is_quantised_in_its_own_dtype(dtype, seed):
    weight, layer = torch.randn(OUT, IN).to(dtype), make(bias=False)
    layer.load_state_dict({"weight": weight})
    expected = native_entries(nf4_quantize(weight))
    expected["nf4_format"] = layer.nf4_format
    assert_entries(layer.state_dict(), expected)
    assert layer.weight_dtype == torch.float32


@pytest.mark.parametrize("names", ["native", "bitsandbytes", "float"])
@pytest.mark.parametrize("assign, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=["copy", "assign"])
def test_the_dense_dtype_is_the_file_s_only_when_assigned(assign, dtype, names, seed):
    source = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    if names != "float":
        source = NF4Linear.from_linear(source)
    layer = make()
    layer.load_state_dict(bnb_state_dict(source) if names == "bitsandbytes" else source.state_dict(), assign=assign)
    assert layer.weight_dtype == layer.dequantize().dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.nf4_format, make(dtype).nf4_format)


def nested_model() -> nn.Module:
    """Names that begin with one another, at three depths."""
    block = nn.ModuleDict({"fc": make(), "fc2": make(double_quant=False), "norm": nn.LayerNorm(IN)})
    return nn.ModuleDict({"fc": make(bias=False, block_size=128), "layers": nn.ModuleList([block])})


def test_a_model_of_several_layers(seed):
    source = nested_model()
    for entries in (source.state_dict(), bnb_state_dict(source)):
        fresh = nested_model()
        assert fresh.load_state_dict(entries) == ([], [])
        assert_entries(fresh.state_dict(), snapshot(source))


def test_pre_hooks_run_once_and_may_rename(seed):
    source, layer, calls = make(), make(), []

    def rename(module: nn.Module, state_dict: Entries, prefix: str, *_: object) -> None:
        calls.append(prefix)
        for key in [key for key in state_dict if key.startswith("old_")]:
            state_dict[key.removeprefix("old_")] = state_dict.pop(key)

    layer.register_load_state_dict_pre_hook(rename)
    layer.load_state_dict({f"old_{key}": value for key, value in bnb_state_dict(source).items()})
    assert calls == [""]
    assert_entries(layer.state_dict(), snapshot(source))
    layer.load_state_dict(source.state_dict())
    assert calls == ["", ""]


# Missing and unexpected names


@pytest.mark.parametrize(
    "keep, missing",
    [([], [*PARTS, "bias"]), (["bias"], list(PARTS)), (list(PARTS), ["bias"])],
    ids=["nothing", "bias alone", "no bias"],
)
def test_missing_names(keep, missing, seed):
    source, layer = make(), make()
    before = snapshot(layer)
    entries = {key: value for key, value in source.state_dict().items() if key in keep}
    found = layer.load_state_dict(entries, strict=False)
    assert set(found.missing_keys) == set(missing) and not found.unexpected_keys
    assert_entries(layer.state_dict(), before | snapshot(source) | {key: before[key] for key in missing})
    with pytest.raises(RuntimeError, match='Missing key.*"' + missing[0]):
        layer.load_state_dict(entries)


@pytest.mark.parametrize("extra", ["x", "weight.junk", "fc.weight", "absmax.x"])
@pytest.mark.parametrize("names", ["native", "bitsandbytes", "float"])
@pytest.mark.parametrize("prefix", ["", "fc."])
def test_unexpected_names(prefix, names, extra, seed):
    linear = nn.Linear(IN, OUT)
    source = NF4Linear.from_linear(linear)
    entries = {"native": source.state_dict(), "bitsandbytes": bnb_state_dict(source), "float": linear.state_dict()}
    given = {prefix + key: value for key, value in entries[names].items()} | {prefix + extra: torch.zeros(1)}
    layer = make()
    module = nn.ModuleDict({"fc": layer}) if prefix else layer
    assert module.load_state_dict(given, strict=False) == ([], [prefix + extra])
    assert_entries(layer.state_dict(), snapshot(source))
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{prefix}{extra}"'):
        module.load_state_dict(given)


def test_an_unwanted_bias_is_unexpected(seed):
    layer = make(bias=False)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        layer.load_state_dict(make().state_dict())


# What is refused

Corrupt = Callable[[Entries], Any]
COMMON: dict[str, tuple[Corrupt, str]] = {
    "truncated codes": (lambda e: e.update(weight=e["weight"][:-1]), r'"weight" must have shape \[1248, 1\]'),
    "flat codes": (lambda e: e.update(weight=e["weight"].flatten()), r'"weight" must have shape \[1248, 1\]'),
    "signed codes": (lambda e: e.update(weight=e["weight"].view(torch.int8)), '"weight" must be torch.uint8'),
    "meta codes": (lambda e: e.update(weight=e["weight"].to("meta")), '"weight" is on the meta device'),
    "a list": (lambda e: e.update(weight=e["weight"].tolist()), '"weight" must be a Tensor, got list'),
    "short bias": (lambda e: e.update(bias=e["bias"][1:]), r'"bias" must have shape \[48\], got \[47\]'),
    "integer bias": (lambda e: e.update(bias=e["bias"].int()), '"bias" must be a floating-point Tensor'),
    "bias not a tensor": (lambda e: e.update(bias=0.0), '"bias" must be a floating-point Tensor, got 0.0'),
    "meta bias": (lambda e: e.update(bias=e["bias"].to("meta")), '"bias" is on the meta device'),
}


def resize(key: str) -> Corrupt:
    return lambda e: e.update({key: torch.cat((e[key].flatten(), e[key].flatten()[:1]))})


def recast(key: str, dtype: torch.dtype) -> Corrupt:
    return lambda e: e.update({key: e[key].to(dtype)})


def set_format(**changes: int) -> Corrupt:
    names = ("version", "rows", "columns", "block_size", "dtype", "nested")
    return lambda e: e.update(
        nf4_format=torch.tensor([changes.get(n, v) for n, v in zip(names, e["nf4_format"].tolist())])
    )


NATIVE = COMMON | {
    "long absmax": (resize("absmax"), r'"absmax" must have shape \[39\], got \[40\]'),
    "float absmax": (recast("absmax", torch.float32), '"absmax" must be torch.uint8, got torch.float32'),
    "long nested_absmax": (resize("nested_absmax"), r'"nested_absmax" must have shape \[1\]'),
    "half nested_absmax": (recast("nested_absmax", torch.float16), '"nested_absmax" must be torch.float32'),
    "long quant map": (resize("nested_quant_map"), r'"nested_quant_map" must have shape \[256\]'),
    "double offset": (recast("offset", torch.float64), '"offset" must be torch.float32'),
    "meta offset": (lambda e: e.update(offset=e["offset"].to("meta")), '"offset" is on the meta device'),
    "offset of a vector": (resize("offset"), r'"offset" must have shape \[\]'),
    "format's dtype": (recast("nf4_format", torch.int32), '"nf4_format" must be torch.int64'),
    "format's size": (resize("nf4_format"), r'"nf4_format" must have shape \[6\]'),
    "format on meta": (lambda e: e.update(nf4_format=e["nf4_format"].to("meta")), '"nf4_format" is on the meta device'),
    "next version": (set_format(version=2), '"nf4_format": version must be 1, got 2'),
    "format's block size": (set_format(block_size=65), '"nf4_format" is corrupt'),
    "format's dtype index": (set_format(dtype=4), '"nf4_format" is corrupt'),
    "format's negative dtype": (set_format(dtype=-1), '"nf4_format" is corrupt'),
    "format's rows": (set_format(rows=0), '"nf4_format" is corrupt'),
    "format's flag": (set_format(nested=2), '"nf4_format" is corrupt'),
    "transposed": (set_format(rows=IN, columns=OUT), r'"weight" must be NF4 of shape \[48, 52\].*got \[52, 48\]'),
    "float beside parts": (lambda e: e.update(weight=torch.zeros(OUT, IN)), '"weight" must be torch.uint8'),
    **{f"no {name}": (lambda e, name=name: e.pop(name), f'"{name}" is missing') for name in PARTS},
}
BNB_NAMES = ["weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", QUANT_STATE_KEY]
BNB = COMMON | {
    "long absmax": (resize("weight.absmax"), r'"weight.absmax" must have shape \[39\], got \[40\]'),
    "float absmax": (recast("weight.absmax", torch.float32), '"weight.absmax" must be torch.uint8'),
    "double nested_absmax": (recast("weight.nested_absmax", torch.float64), '"weight.nested_absmax" must be'),
    "long nested map": (resize("weight.nested_quant_map"), r'"weight.nested_quant_map" must have shape \[256\]'),
    "another table": (lambda e: e["weight.quant_map"].mul_(0.99), '"weight.quant_map" is not the NF4 table'),
    "a table's size": (resize("weight.quant_map"), r'"weight.quant_map" must have shape \[16\]'),
    "state of floats": (recast(QUANT_STATE_KEY, torch.float32), f'"{QUANT_STATE_KEY}" must be the uint8 bytes'),
    "state on meta": (lambda e: e.update({QUANT_STATE_KEY: e[QUANT_STATE_KEY].to("meta")}), "is on the meta device"),
    "truncated state": (lambda e: e.update({QUANT_STATE_KEY: e[QUANT_STATE_KEY][:-1]}), "is not JSON"),
    "binary state": (lambda e: e[QUANT_STATE_KEY].fill_(255), "is not JSON"),
    "state of a list": (
        lambda e: e.update({QUANT_STATE_KEY: torch.tensor(list(b"[1]"), dtype=torch.uint8)}),
        "must be a JSON object, got list",
    ),
    "fp4": (lambda e: edit_quant_state(e, quant_type="fp4"), "quant_type must be 'nf4', got 'fp4'"),
    "block size": (lambda e: edit_quant_state(e, blocksize=48), "blocksize must be one of .*, got 48"),
    "block size as text": (lambda e: edit_quant_state(e, blocksize="64"), "'blocksize' must be int, got '64'"),
    "three sizes": (lambda e: edit_quant_state(e, shape=[2, 24, 52]), r"shape must be \[out, in\]"),
    "negative size": (lambda e: edit_quant_state(e, shape=[-48, -52]), r"shape must be \[out, in\]"),
    "transposed": (lambda e: edit_quant_state(e, shape=[IN, OUT]), r'"weight" must be NF4 of shape \[48, 52\]'),
    "dtype": (lambda e: edit_quant_state(e, dtype="int8"), "dtype must be one of .*, got 'int8'"),
    "nested block size": (lambda e: edit_quant_state(e, nested_blocksize=128), "nested_blocksize must be 256, got 128"),
    "infinite offset": (lambda e: edit_quant_state(e, nested_offset=float("inf")), "nested_offset must be finite"),
    **{
        f"no {field}": (lambda e, field=field: edit_quant_state(e, **{field: None}), f"has no '{field}'")
        for field in ("quant_type", "blocksize", "shape", "dtype", "nested_blocksize", "nested_offset")
    },
    **{f"no {name}": (lambda e, name=name: e.pop(name), f'"{name}" is missing') for name in ["weight", *BNB_NAMES]},
}
FLOAT = {
    "short bias": COMMON["short bias"],
    "transposed": (lambda e: e.update(weight=e["weight"].T), r'"weight" must have shape \[48, 52\].*got \[52, 48\]'),
    "NaN": (lambda e: e["weight"][3].fill_(float("nan")), '"weight": .*must be finite'),
    "integers": (recast("weight", torch.int8), '"nf4_format" is missing'),
    "8-bit float": (recast("weight", torch.float8_e4m3fn), '"weight" must be one of .*, got torch.float8_e4m3fn'),
    "meta": COMMON["meta codes"],
    "meta bias": COMMON["meta bias"],
}
CASES = {"native": NATIVE, "bitsandbytes": BNB, "float": FLOAT}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@ASSIGN
@pytest.mark.parametrize(
    "names, case", [(names, case) for names, cases in CASES.items() for case in cases], ids=lambda value: value
)
def test_a_corrupt_entry_is_named_and_changes_nothing(names, case, assign, strict, seed):
    linear = nn.Linear(IN, OUT)
    source = NF4Linear.from_linear(linear)
    entries: Entries = {
        "native": source.state_dict(),
        "bitsandbytes": bnb_state_dict(source),
        "float": linear.state_dict(),
    }[names]
    entries = {key: value.clone() for key, value in entries.items()}
    corrupt, message = CASES[names][case]
    corrupt(entries)
    layer = make()
    before, parameters = snapshot(layer), dict(layer.named_parameters())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(entries, strict=strict, assign=assign)
    assert_entries(layer.state_dict(), before)
    assert all(dict(layer.named_parameters())[name] is value for name, value in parameters.items())
    assert layer.weight_dtype == torch.float32
    assert layer.load_state_dict(source.state_dict()) == ([], [])


@pytest.mark.parametrize("names", ["native", "bitsandbytes"])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 128}, "must have block size 64, got 128"),
        ({"double_quant": False}, "must have double_quant=True, got False"),
    ],
    ids=["block size", "flat"],
)
def test_another_format_is_refused(options, message, names, seed):
    source, layer = make(**options), nn.ModuleDict({"fc": make()})
    before = snapshot(layer)
    entries = bnb_state_dict(source) if names == "bitsandbytes" else source.state_dict()
    with pytest.raises(RuntimeError, match=f'"fc.weight" {message}'):
        layer.load_state_dict({f"fc.{key}": value for key, value in entries.items()})
    assert_entries(layer.state_dict(), before)


def test_errors_name_the_full_key_and_every_layer(seed):
    model = nested_model()
    entries = bnb_state_dict(model)
    del entries["layers.0.fc.weight.absmax"]
    entries["layers.0.fc2.weight.absmax"] = entries["layers.0.fc2.weight.absmax"].double()
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(entries)
    assert '"layers.0.fc.weight.absmax" is missing' in str(error.value)
    assert '"layers.0.fc2.weight.absmax" must be torch.float32, got torch.float64' in str(error.value)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.9, 0.999])
def test_a_truncated_file_changes_nothing(kept, seed, tmp_path: Path):
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import load_model, save_model

    path, layer = tmp_path / "model.safetensors", make()
    save_model(make(), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    before = snapshot(layer)
    with pytest.raises((safetensors.SafetensorError, OSError)):
        load_model(layer, path)
    assert_entries(layer.state_dict(), before)


def test_flat_layers_have_no_nested_names():
    assert set(make(bias=False, double_quant=False).state_dict()) == set(FLAT_PARTS)
    entries = bnb_state_dict(make(bias=False, double_quant=False))
    assert set(entries) == {"weight", "weight.absmax", "weight.quant_map", QUANT_STATE_KEY}
    assert "nested_offset" not in json.loads(bytes(entries[QUANT_STATE_KEY].tolist()))
