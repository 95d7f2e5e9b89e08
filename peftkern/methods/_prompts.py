"""What the methods with trained prompts share: putting them into a transformers model, and PEFT's files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftkern._modules import activate
from peftkern.adapter_file import CONFIG_NAME, TENSORS_NAME, check_pair, read_config, read_tensors
from peftkern.methods._method import Method
from peftkern.nn._prompts import PromptModule
from peftkern.ops._linear import FLOATING

EMBEDDINGS_KEY = "prompt_embeddings"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_LIMITS = ("max_position_embeddings", "n_positions")

Call = tuple[tuple[Any, ...], dict[str, Any]]


class PromptMethod(Method):
    """A method whose module turns a model's input_ids into inputs_embeds, in a hook before its forward.

    The module is the model's attribute `name`. Nothing that the model is given counts the prompt: mask, labels and
    position ids are made longer in the hook, on every step of generation. What it returns does count it, as PEFT's
    models do: logits and hidden states begin with the prompt's places.
    """

    module: ClassVar[type[PromptModule]]
    peft_type: ClassVar[str]
    overwrites = True

    def embedding(self, op: str, model: nn.Module, num_virtual_tokens: Any) -> nn.Module:
        """The token embedding of a model that can have a prompt of this length; everything about it is checked.

        Raises:
            TypeError: the model has none, or takes no inputs_embeds.
            ValueError: it has no room for the prompt, or has one of another method.
        """
        get = getattr(model, "get_input_embeddings", None)
        embedding = get() if callable(get) else None
        if not isinstance(embedding, nn.Module):
            raise TypeError(
                f"{op}: model must have get_input_embeddings(), as transformers' have; {_name(model)} has not"
            )
        taker = _encoder(model) or model
        if "inputs_embeds" not in inspect.signature(taker.forward).parameters:
            raise TypeError(f"{op}: the forward of {type(taker).__name__} must take inputs_embeds")
        config = _text_config(model)
        limit = next((value for value in (getattr(config, name, None) for name in _LIMITS) if value), None)
        if limit is not None and isinstance(num_virtual_tokens, int) and num_virtual_tokens >= limit:
            raise ValueError(
                f"{op}: num_virtual_tokens must leave room for tokens in the model's {limit} positions, "
                f"got {num_virtual_tokens}"
            )
        for path, module in model.named_modules():
            if isinstance(module, PromptModule) and type(module) is not self.module and module.settings:
                raise ValueError(f'{op}: the model has prompts of another method, "{path}"')
        return embedding

    def put(self, model: nn.Module, adapter_name: str, embedding: nn.Module, **options: Any) -> None:
        """Adds a prompt to the model's module, or a module with it, active and alone trainable.

        Raises:
            TypeError, ValueError: an option that cannot be. Nothing has changed then.
        """
        present = self.modules(model)
        if present:
            cast(Any, next(iter(present.values()))).add_adapter(adapter_name, embedding, **options)
        else:
            prompts = cast(Any, self.module)(embedding, **options, adapter_name=adapter_name)
            model.add_module(self.name, prompts.train(model.training))
            _hook(model, prompts)
        model.requires_grad_(False)
        activate(model, adapter_name)

    def holder(self, model: nn.Module, adapter_name: str) -> Any:
        """The module with this prompt."""
        return next(iter(self.modules(model, adapter_name).values()))

    def config(self, model: nn.Module, rows: int, features: int, base_model_name_or_path: str | None) -> dict[str, Any]:
        """What PEFT's config has for every prompt."""
        return {
            "peft_type": self.peft_type,
            "task_type": _task(model),
            "base_model_name_or_path": base_model_name_or_path,
            "inference_mode": True,
            "num_virtual_tokens": rows,
            "token_dim": features,
            # PEFT makes two for an encoder-decoder, and uses the encoder's.
            "num_transformer_submodules": 1,
            "num_attention_heads": None,
            "num_layers": None,
        }

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config["peft_type"] == self.peft_type

    def read(self, model: nn.Module, directory: Path) -> tuple[dict[str, Any], Tensor, nn.Module]:
        """The config, the prompt [rows, features] and the embedding of the model that can have it, all checked.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `load` does.
        """
        check_pair(directory)
        config = read_config(directory / CONFIG_NAME)
        where = directory / TENSORS_NAME
        rows = config.get("num_virtual_tokens")
        if type(rows) is not int or rows < 1:
            raise ValueError(f"load: {directory / CONFIG_NAME}: num_virtual_tokens must be positive, got {rows!r}")
        tensors = read_tensors(where)
        for key in tensors:
            if key != EMBEDDINGS_KEY:
                raise ValueError(f'load: {where}: "{key}" is not a prompt; trained heads are not supported')
        if EMBEDDINGS_KEY not in tensors:
            raise ValueError(f'load: {where} has no "{EMBEDDINGS_KEY}"')
        embedding = self.embedding("load", model, rows)
        features = cast(Tensor, embedding.weight).shape[1]
        values = tensors[EMBEDDINGS_KEY]
        shapes = [[rows * count, features] for count in (1, 2)]
        if values.dtype not in FLOATING or list(values.shape) not in shapes or not torch.isfinite(values).all():
            wanted = f"finite floating-point {shapes[0]} (rows, the embedding's features)"
            got = f"{values.dtype} {list(values.shape)}"
            raise ValueError(f'load: {where}: "{EMBEDDINGS_KEY}" must be {wanted}, got {got}')
        return config, values[:rows], embedding


def check_values(adapter_name: str, parameters: tuple[nn.Parameter, ...]) -> None:
    """Raises ValueError unless an adapter can be saved."""
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError(f"save: adapter {adapter_name!r} is on the meta device and has no values to save")


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder."""
    return (
        cast(Any, model).get_encoder() if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
    )


def _task(model: nn.Module) -> str:
    """PEFT's task_type, without which it leaves the prompt out. Of the classifiers' it would want a trained head."""
    if _encoder(model) is not None:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if _name(model).endswith(_CAUSAL) else "FEATURE_EXTRACTION"


def _hook(model: nn.Module, prompts: PromptModule) -> None:
    """Lets the prompts into every call of the model. Only functions of this file and modules: a copy of the model, or a
    pickled one, has its own."""

    def before(module: nn.Module, hook: Callable[..., Call]) -> None:
        names = tuple(inspect.signature(module.forward).parameters)
        module.register_forward_pre_hook(partial(hook, prompts, names), with_kwargs=True)

    encoder = _encoder(model)
    if encoder is None:
        before(model, _before_model)
    else:
        # generate() calls the encoder by itself.
        before(model, _before_encoder_decoder)
        before(encoder, _before_encoder)
        before(cast(Any, model).get_decoder(), _before_decoder)
    if hasattr(model, "prepare_inputs_for_generation"):
        # Another method may have put its own there.
        present = vars(model).get("prepare_inputs_for_generation")
        cast(Any, model).prepare_inputs_for_generation = partial(_prepare_inputs, model, prompts, present)


def _prepare_inputs(
    model: Any, prompts: PromptModule, present: Any, *args: Any, prompt_ids: Any = None, **kwargs: Any
) -> Any:
    """`prepare_inputs_for_generation`, so that generate() takes prompt_ids and goes on from a cache."""
    cache = kwargs.get("past_key_values")
    if kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None and _is_filled(cache):
        # generate() takes every place in the cache for one of its tokens.
        kwargs["next_sequence_length"] += prompts.prefix_length
    prepare = present or partial(type(model).prepare_inputs_for_generation, model)
    inputs = prepare(*args, **kwargs)
    if prompt_ids is not None:
        inputs["prompt_ids"] = prompt_ids
    return inputs


def _is_filled(cache: Any) -> bool:
    return cache is not None and bool(cache.get_seq_length())


def _by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args)), **kwargs}


def _before_model(
    prompts: PromptModule, names: tuple[str, ...], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call:
    """A model's own call."""
    if not prompts.settings:
        return args, kwargs
    prompt_ids = kwargs.pop("prompt_ids", None)
    if not prompts.prompting:
        return args, kwargs
    call = _by_name(names, args, kwargs)
    if _is_filled(call.get("past_key_values")):
        _go_on(call, prompts.prefix_length)
    elif call.get("input_ids") is not None or call.get("inputs_embeds") is not None:
        _begin(prompts, cast(Any, model).get_input_embeddings(), call, prompt_ids)
    return (), call


def _begin(prompts: PromptModule, embedding: nn.Module, call: dict[str, Any], prompt_ids: Any) -> None:
    """Puts the prompt into a call with an empty cache."""
    input_ids, inputs_embeds = call.pop("input_ids", None), call.get("inputs_embeds")
    shape = cast(Tensor, input_ids).shape if inputs_embeds is None else inputs_embeds.shape[:2]
    _check_mask(call.get("attention_mask"))
    labels = call.get("labels")
    # Labels of samples stay as they are.
    of_tokens = labels if isinstance(labels, Tensor) and labels.shape == shape else None
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    result = prompts(input_ids, embedding, mask, of_tokens, positions, prompt_ids, inputs_embeds)
    call["inputs_embeds"] = result.inputs_embeds
    for name, value in (("attention_mask", result.attention_mask), ("position_ids", result.position_ids)):
        if value is not None:
            call[name] = value
    if result.labels is not None:
        call["labels"] = result.labels
    rows = prompts.prefix_length
    if rows and call.get("token_type_ids") is not None:
        call["token_type_ids"] = _longer(call["token_type_ids"], rows, 0)
    for name in ("start_positions", "end_positions"):
        if rows and call.get(name) is not None:
            call[name] = call[name] + rows


def _go_on(call: dict[str, Any], rows: int) -> None:
    """A call whose cache holds the prompt."""
    _check_mask(call.get("attention_mask"))
    if rows and call.get("attention_mask") is not None:
        call["attention_mask"] = _longer(call["attention_mask"], rows, 1)
    if rows and call.get("position_ids") is not None:
        call["position_ids"] = call["position_ids"] + rows


def _check_mask(mask: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"prompt: attention_mask must have shape [batch, tokens], got {got}; a cache of a fixed size, which makes "
            "others, is not supported"
        )


def _longer(values: Tensor, rows: int, fill: int) -> Tensor:
    """`values` [batch, tokens] behind `rows` more."""
    return torch.cat((values.new_full((values.shape[0], rows), fill), values), dim=1)


def _before_encoder_decoder(
    prompts: PromptModule, names: tuple[str, ...], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call:
    """The encoder's own hook puts the prompt in; the decoder needs the encoder's mask."""
    if not prompts.settings:
        return args, kwargs
    if not prompts.prompting:
        kwargs.pop("prompt_ids", None)
        return args, kwargs
    call = _by_name(names, args, kwargs)
    if call.get("encoder_outputs") is not None:
        call.pop("prompt_ids", None)
    _check_mask(call.get("attention_mask"))
    if call.get("attention_mask") is not None and prompts.prefix_length:
        call["attention_mask"] = _longer(call["attention_mask"], prompts.prefix_length, 1)
    return (), call


def _before_encoder(
    prompts: PromptModule, names: tuple[str, ...], encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call:
    """Called by the model, whose hook has made the mask longer, or by generate()."""
    if not prompts.settings:
        return args, kwargs
    prompt_ids = kwargs.pop("prompt_ids", None)
    if not prompts.prompting:
        return args, kwargs
    call = _by_name(names, args, kwargs)
    given = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    mask = call.get("attention_mask")
    if mask is not None and given is not None and mask.shape[1] == given.shape[1] + prompts.prefix_length:
        call["attention_mask"] = mask[:, prompts.prefix_length :]
    _begin(prompts, cast(Any, encoder).get_input_embeddings(), call, prompt_ids)
    return (), call


def _before_decoder(
    prompts: PromptModule, names: tuple[str, ...], decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call:
    """What the model hands to both halves is the encoder's."""
    kwargs.pop("prompt_ids", None)
    return args, kwargs
