"""transformers' `from_pretrained` and `save_pretrained` on NF4Linear layers: the quantizer `peftkern_nf4`.

Importing this module, or reading `peftkern.NF4Config`, registers it with transformers. A layer stays a dense nn.Linear
on meta until its weight arrives, so that transformers knows the names `weight` and `bias` alone: the op that converts
the weight puts an NF4Linear in the layer's place. Files have bitsandbytes' names, see `integrations.bitsandbytes`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations import is_fsdp_enabled
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftkern.integrations.bitsandbytes import DTYPES, QUANT_STATE_KEY, bnb_state_dict, read_bnb
from peftkern.model import _has_part
from peftkern.nf4 import NF4Weight
from peftkern.nn.nf4_linear import NF4Linear, gathered
from peftkern.ops.nf4_quantize import BLOCK_SIZES

METHOD = "peftkern_nf4"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
# With its share of absmax, at the default block size and double quantisation: for planning device maps.
_BYTES_PER_ELEMENT = 0.516
_FP4_STATE_KEY = "weight.quant_state.bitsandbytes__fp4"


def _dtype_of(value: Any) -> torch.dtype | None:
    """A dtype by itself or by its name, with or without "torch."."""
    name = None if value is None else str(value).removeprefix("torch.")
    if name is not None and name not in _DTYPES:
        raise TypeError(f"NF4Config: compute_dtype must be one of {', '.join(_DTYPES)} or None, got {value!r}")
    return None if name is None else _DTYPES[name]


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """`quantization_config` of `from_pretrained`: layers become NF4Linear as they load (QLoRA, arXiv 2305.14314).

    The output head, weights tied to it and the last layer stay dense, as with transformers' other quantizers.

    Args:
        block_size, double_quant: see `nf4_quantize`. A checkpoint that is 4-bit already keeps its own.
        compute_dtype: see `NF4Linear`; a dtype or its name. None computes in x's dtype.
        skip: further layers to leave dense, each named by consecutive parts of its path: "layers.0", "down_proj".
        checkpoint: what `save_pretrained` makes config.json ask for: "peftkern" (this quantizer) or "bitsandbytes". The
            tensors are the same, bitsandbytes' own.
        quant_method: "peftkern_nf4"; transformers passes it.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        skip: str | list[str] | None = None,
        checkpoint: Literal["peftkern", "bitsandbytes"] = "peftkern",
        quant_method: str = METHOD,
    ) -> None:
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"NF4Config: block_size must be one of {BLOCK_SIZES}, got {block_size!r}")
        if not isinstance(double_quant, bool):
            raise TypeError(f"NF4Config: double_quant must be a bool, got {double_quant!r}")
        names = [skip] if isinstance(skip, str) else list(skip or ())
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"NF4Config: skip must be names of modules, got {skip!r}")
        if checkpoint not in ("peftkern", "bitsandbytes"):
            raise ValueError(f"NF4Config: checkpoint must be 'peftkern' or 'bitsandbytes', got {checkpoint!r}")
        if quant_method != METHOD:
            raise ValueError(f"NF4Config: quant_method must be {METHOD!r}, got {quant_method!r}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = _dtype_of(compute_dtype)
        self.skip = names
        self.checkpoint = checkpoint

    @classmethod
    def from_bnb(cls, config: Mapping[str, Any]) -> "NF4Config":
        """The `quantization_config` of a bitsandbytes checkpoint's config.json, as one that this quantizer reads.

        Raises:
            ValueError: the checkpoint is not NF4.
        """
        quant_type = config.get("bnb_4bit_quant_type", "fp4")
        if not config.get("load_in_4bit") or quant_type != "nf4":
            found = quant_type if config.get("load_in_4bit") else config.get("quant_method")
            raise ValueError(f"NF4Config.from_bnb: the checkpoint must be bitsandbytes' NF4, got {found!r}")
        return cls(
            double_quant=config.get("bnb_4bit_use_double_quant", False),
            # What bitsandbytes takes where the file says nothing.
            compute_dtype=config.get("bnb_4bit_compute_dtype") or torch.float32,
            skip=config.get("llm_int8_skip_modules"),
            checkpoint="bitsandbytes",
        )

    def to_dict(self) -> dict[str, Any]:
        """What config.json stores."""
        return self._own_dict() if self.checkpoint == "peftkern" else self.to_bnb()

    def _own_dict(self) -> dict[str, Any]:
        compute_dtype = None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch.")
        return {**vars(self), "compute_dtype": compute_dtype, "skip": list(self.skip)}

    def to_bnb(self) -> dict[str, Any]:
        """What config.json of a bitsandbytes checkpoint has: a BitsAndBytesConfig. compute_dtype None becomes fp32."""
        own = self._own_dict()
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": own["compute_dtype"] or "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": own["skip"] or None,
        }


def nf4_config(pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
    """A checkpoint's config that has `from_pretrained(..., config=...)` load it by this quantizer.

    For checkpoints whose config.json asks for bitsandbytes, which then need not be installed: the same bytes, as
    NF4Linear layers. One that asks for this quantizer is returned as it is.

    Args:
        pretrained_model_name_or_path: as for `AutoConfig.from_pretrained`.
        kwargs: for `AutoConfig.from_pretrained`.

    Raises:
        ValueError: the checkpoint is not NF4.
    """
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, Mapping):
        raise ValueError(
            f"nf4_config: {pretrained_model_name_or_path} is not quantised; pass quantization_config instead"
        )
    if quantization.get("quant_method") != METHOD:
        config.quantization_config = NF4Config.from_bnb(quantization)._own_dict()
    return config


def _shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an nn.Linear, or of a Conv1D, which is one transposed."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def _swap(model: Any, path: str, q: NF4Weight, compute_dtype: torch.dtype | None) -> NF4Linear:
    """Puts an NF4Linear with this weight and the bias of the layer at `path` into its place."""
    dense = model.get_submodule(path)
    rows, columns = q.shape
    layer = NF4Linear(
        columns,
        rows,
        bias=False,
        device="meta",
        dtype=q.dtype,
        block_size=q.block_size,
        double_quant=q.nested,
        compute_dtype=compute_dtype,
    )
    layer._assign(q)
    layer.bias = dense.bias
    layer.train(dense.training)
    for tensor in layer._own_entries().values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    # Else transformers would draw the codes anew. A bias that the file lacks is still drawn: it has no mark.
    layer._is_hf_initialized = layer.bias is None or hasattr(layer.bias, "_is_hf_initialized")  # type: ignore[assignment]
    model.set_submodule(path, layer)
    return layer


class _Op(ConversionOps):
    # transformers casts what a converter loads unless its op has this very name.
    def __init__(self, hf_quantizer: "NF4Quantizer") -> None:
        self.hf_quantizer = hf_quantizer


class _Quantize(_Op):
    """A dense weight to an NF4Linear's codes, while loading."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        ((key, value),) = input_dict.items()
        return {key: self.hf_quantizer.quantize(model, full_layer_name.rpartition(".")[0], _single(value)).weight}


class _Read(_Op):
    """bitsandbytes' entries of one layer to an NF4Linear's codes; a weight without such entries stays as it is."""

    dtype: torch.dtype | None = None

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        path = full_layer_name.rpartition(".")[0]
        module = model.get_submodule(path)
        if list(input_dict) == ["weight"]:
            weight = _single(input_dict["weight"])
            if not weight.is_floating_point() and _is_linear(module):
                raise ValueError(f'"{path}.{QUANT_STATE_KEY}" is missing')
            return {"weight": weight.to(self.dtype) if weight.is_floating_point() else weight}
        if not _is_linear(module):
            raise ValueError(f'"{full_layer_name}" is 4-bit, but {type(module).__name__} is no linear layer')
        q = read_bnb({f"{path}.{name}": _single(value) for name, value in input_dict.items()}, f"{path}.")
        if tuple(q.shape) != _shape_of(module):
            raise ValueError(f'"{full_layer_name}" must have shape {list(_shape_of(module))}, got {list(q.shape)}')
        layer = _swap(model, path, q, self.hf_quantizer.quantization_config.compute_dtype)
        return {"weight": layer.weight}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Keep()


class _Keep(ConversionOps):
    """What saving does to tensors that `get_state_dict_and_metadata` has named already."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return input_dict


class _Conversion(WeightConverter):
    """For older releases, which would rename what is saved to the first of the names that are loaded."""

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("weight", "weight")


def _single(value: Any) -> Tensor:
    """transformers collects each name's tensors in a list."""
    return value[0] if isinstance(value, list) else value


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """transformers' side of NF4Config; `from_pretrained` makes and calls it."""

    requires_calibration = False
    quantization_config: NF4Config
    is_trainable = True
    is_compileable = True
    quantized_element_size = _BYTES_PER_ELEMENT
    serialized_names = {  # noqa: RUF012 -- declared so by the base class
        "weight": [
            "weight",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_map",
            "weight.absmax",
            QUANT_STATE_KEY,
            _FP4_STATE_KEY,  # to be refused by name
        ]
    }

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.paths: set[str] = set()

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for ways to load that cannot work with codes and scales."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("NF4Config: 4-bit layers cannot be offloaded to disk; use a device_map without it")
        if is_fsdp_enabled():
            # accelerate sends what rank 0 has loaded to the others, but no buffers, and the scales are buffers.
            raise ValueError("NF4Config: FSDP must have cpu_ram_efficient_loading=False, got True")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether it is the weight of a layer to be 4-bit."""
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.paths

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None, so that scales keep their dtype; what dense weights are to have is left with the op."""
        for op in getattr(converter, "operations", ()):
            if isinstance(op, _Read):
                op.dtype = dtype
        return super().get_new_dtype(converter, param, dtype)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type]:
        return {"deserialize": _Read}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The base class makes it of the two above; not in older releases, which know neither."""
        if hasattr(HfQuantizer, "serialized_names"):
            return super().get_weight_conversions()
        names = sorted(self.serialized_names["weight"], key=len, reverse=True)  # the first that matches is taken
        return [_Conversion(names, "weight", [_Read(self)])] if self.pre_quantized else []

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """What `save_pretrained` writes; a sharded model is gathered, so that every process has to call it."""
        entries = {name: gathered(value) for name, value in model.state_dict().items()}
        return bnb_state_dict(model, entries), {}

    def quantize(self, model: nn.Module, path: str, weight: Tensor) -> NF4Linear:
        """Swaps the layer at `path` for an NF4Linear of this weight."""
        config = self.quantization_config
        dense = weight.T if isinstance(model.get_submodule(path), Conv1D) else weight
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(dense.contiguous(), requires_grad=False)
        q = NF4Linear.from_linear(linear, config.block_size, config.double_quant).nf4
        return _swap(model, path, q, config.compute_dtype)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        linears = [path for path, module in model.named_modules() if path and _is_linear(module)]
        skip = self.quantization_config.skip
        for name in skip if not self.pre_quantized else ():
            if not any(_has_part(path, name) for path in linears):
                raise ValueError(f"NF4Config: skip={name!r} matches no linear layer of {type(model).__name__}")
        dense = get_keys_to_not_convert(model) + list(getattr(model, "_keep_in_fp32_modules", None) or ())
        self.paths = {
            path
            for path in linears
            if should_convert_module(path, dense) and not any(_has_part(path, name) for name in skip)
        }
        if not self.paths:
            raise ValueError(
                f"NF4Config: {type(model).__name__} has no linear layer to quantise besides its head and skip"
            )
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        # Layers that the checkpoint lacks, which transformers has initialised.
        if not self.pre_quantized:
            for path in sorted(self.paths):
                module = model.get_submodule(path)
                if not isinstance(module, NF4Linear):
                    self.quantize(model, path, module.weight.detach())
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for path, module in list(model.named_modules()):
            if isinstance(module, NF4Linear):
                dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                dense.weight = nn.Parameter(module.dequantize(dtype))
                dense.bias = None if module.bias is None else nn.Parameter(module.bias.detach().to(dense.weight.dtype))
                model.set_submodule(path, dense.train(module.training))
        return model
