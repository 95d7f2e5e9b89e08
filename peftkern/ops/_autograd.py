"""Gradients of an op in eager mode and under torch.func, and vmap of it.

torch.library dispatches an op that has a formula to Python and back twice, which takes longer than the products of a
small layer: 75 us against 22 us for a 16 x 16 lora_linear. What `eager` returns runs the formula in one
autograd.Function, to which lists of tensors are given flat, and is the op itself for torch.compile, torch.export and
modes. torch.func gets a Function of its own kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from peftkern.ops._op import Op

Getter = Callable[[Sequence[Any]], tuple[Any, ...]]
# Of results: the lengths of lists, None for a tensor.
Shape = list[int | None]


class Record:
    """What a Function is given beside its tensors. No pytree: torch.func hands it through as it is."""

    __slots__ = ("inputs", "shape")

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs
        self.shape: Shape = []


class Unsaved:
    """What a formula knows of a tensor that was not saved."""

    __slots__ = ("dtype", "shape")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


class Plan:
    """Where the tensors to save stand among a call's arguments and results, and what is kept of the others.

    Made once for each number of tensors in the lists, so that a call does its bookkeeping in itemgetters: loops over
    names took 15 us of the 90 of a small layer.
    """

    def __init__(self, op: Op, saves: Sequence[str], counts: Sequence[int]) -> None:
        lists = dict(zip(op.lists, counts))
        singles = [name for name in saves if name not in lists]
        saved_lists = [name for name in saves if name in lists]
        rest = [name for name in op.names if name not in saves and (name in lists or name in op.tensors)]
        plain = [name for name in op.names if name not in saves and name not in rest]
        self._singles, self._lists = getter(op.values, singles), getter(op.values, saved_lists)
        self._plain, self._rest = getter(op.values, plain), getter(op.values, rest)
        self._saved = _parts(len(singles), [lists[name] for name in saved_lists])
        self._arguments: dict[tuple[str, ...], Getter] = {}
        self._backward_names = op.backward_names
        # Of what `restored` gives.
        self.names = [*plain, *rest, *singles, *saved_lists]
        self.needs = _parts(len(op.tensors), counts, 1)

    def save(self, ctx: Any, values: tuple[Any, ...]) -> None:
        """Tensors where torch wants them, and what is left of the call as an attribute."""
        tensors = self._singles(values)
        for each in self._lists(values):
            tensors += tuple(each)
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.kept = self, (*self._plain(values), *map(described, self._rest(values)))

    def restored(self, ctx: Any) -> tuple[Any, ...]:
        return ctx.kept + self._saved(ctx.saved_tensors)

    def backward_arguments(self, values: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, ...]:
        """Those of the op's backward: the ones that are given, and of those that were restored the others."""
        key = tuple(given)
        arguments = self._arguments.get(key)
        if arguments is None:
            places = {name: i for i, name in enumerate((*self.names, *key))}
            arguments = self._arguments[key] = _items([places[name] for name in self._backward_names])
        return arguments((*values, *given.values()))


def eager(op: Op, ops: Any, overload: Any) -> Callable[..., Any]:
    """The op of one namespace for calls by position."""
    below_autograd, names = torch._C._AutoDispatchBelowAutograd, (*op.tensors, *op.lists)
    single_values, list_values = getter(op.names, op.tensors), getter(op.names, op.lists)

    def forward(ctx: Any, record: Record, *tensors: Any) -> Any:
        with below_autograd():
            output = overload(*record.inputs)
        op.save(ctx, record.inputs, output)
        if op.gives_lists:
            ctx.shape = record.shape = shape_of(output)
            return tuple(_flat(output))
        return output

    def found(ctx: Any, grad: Any) -> list[Any]:
        """What the formula found, flat: also what is not needed."""
        plan = ctx.plan
        needs = dict(zip(names, plan.needs(ctx.needs_input_grad)))
        grads = op.gradients(ops, ctx, needs, nested(grad, ctx.shape)[0] if op.gives_lists else grad[0])
        wanted = [None, *map(grads.get, op.tensors)]
        for name in op.lists:
            wanted += grads.get(name) or [None] * len(needs[name])
        return wanted

    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(found(ctx, grads))  # the engine drops what is not needed

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{op.name}: forward mode is not implemented; use backend='reference' for it")

    members: dict[str, Any] = {"forward": forward, "backward": backward, "jvp": jvp}
    function = _function(f"{op.name}_function", members)
    # Function.apply first looks for what torch.func has left behind: 4 us of 90.
    apply = super(torch.autograd.Function, function).apply

    # torch.func gives a Function its tensors at each level, as arguments, and sees what it saves in setup_context.
    def filled(record: Record, tensors: Sequence[Any]) -> tuple[Any, ...]:
        values, rest = dict(zip(op.names, record.inputs)), iter(tensors)
        values |= zip(op.tensors, rest)
        values |= {name: list(islice(rest, len(values[name]))) for name in op.lists}
        return tuple(values.values())

    def forward_alone(record: Record, *tensors: Any) -> Any:
        with below_autograd():
            output = overload(*filled(record, tensors))
        if op.gives_lists:
            record.shape = shape_of(output)
            return tuple(_flat(output))
        return output

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        record, *tensors = inputs
        op.save(ctx, filled(record, tensors), nested(output, record.shape) if op.gives_lists else output)
        ctx.shape = record.shape

    def backward_alone(ctx: Any, *grads: Any) -> Any:
        return tuple(needed(ctx.needs_input_grad, found(ctx, grads)))

    members |= {"forward": forward_alone, "setup_context": setup_context, "backward": backward_alone}
    transformed = _function(f"{op.name}_transformed", members)
    transformed.generate_vmap_rule = True

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*inputs)
        run = transformed.apply
        if torch._C._functorch.peek_interpreter_stack() is None:
            if torch._C._len_torch_dispatch_stack() > 0:
                return overload(*inputs)
            if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and _requires_grad(inputs)):
                with below_autograd():
                    return overload(*inputs)
            run = apply
        tensors = single_values(inputs)
        for each in list_values(inputs):
            tensors += tuple(each)
        record = Record(inputs)
        output = run(record, *tensors)
        return nested(output, record.shape) if op.gives_lists else output

    return call


def vmap(overload: Any, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """One call after the other, as torch does by itself for ops without lists."""
    return _one_by_one(overload, info.batch_size, in_dims, *args)


def legacy_vmap(overload: Any, *args: Any) -> Any:
    """The same for `is_grads_batched` of torch.autograd.grad, whose tensors are of another kind."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    sizes: list[int] = []

    def dim(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [dim(each) for each in value]
        return 0 if isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value) else None

    def unwrapped(value: Any, of: Any) -> Any:
        if isinstance(of, list):
            return [unwrapped(*each) for each in zip(value, of)]
        if of is None:
            return value
        value = torch._remove_batch_dim(value, level, 1, 0)
        sizes.append(len(value))
        return value

    in_dims = dim(args)
    values = unwrapped(args, in_dims)
    output, _ = _one_by_one(overload, sizes[0], in_dims, *values)
    wrapped = [
        torch._add_batch_dim(each, 0, level) for each in _flat([output] if isinstance(output, Tensor) else output)
    ]
    return wrapped[0] if isinstance(output, Tensor) else nested(wrapped, shape_of(output))


def _one_by_one(overload: Any, size: int, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:

    def part(value: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, list | tuple):
            return [part(each, of, i) for each, of in zip(value, dim)]
        return value if dim is None else value.select(dim, i)

    outputs = [overload(*(part(value, dim, i) for value, dim in zip(args, in_dims))) for i in range(size)]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    shape = shape_of(outputs[0])
    together = nested([torch.stack(each) for each in zip(*map(_flat, outputs))], shape)
    return together, nested([0] * len(_flat(together)), shape)


def described(value: Any) -> Any:
    """`Unsaved` for each tensor."""
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    return None if value is None else Unsaved(value)


def needed(needs: Sequence[bool], grads: Sequence[Any] | None) -> list[Any]:
    """The gradients that are needed, None for the others."""
    if grads is None:
        return [None] * len(needs)
    return [grad if need else None for need, grad in zip(needs, grads, strict=True)]


def getter(names: Sequence[str], wanted: Sequence[str]) -> Getter:
    """A function of values by `names` that gives those that are wanted."""
    return _items([names.index(name) for name in wanted])


def _parts(singles: int, counts: Sequence[int], first: int = 0) -> Getter:
    """A function that gives so many values from the first on, then so long runs of those that follow."""
    places: list[Any] = list(range(first, first + singles))
    first += singles
    for count in counts:
        places.append(slice(first, first + count))
        first += count
    return _items(places)


def _items(places: Sequence[Any]) -> Getter:
    if len(places) > 1:
        return itemgetter(*places)
    return (lambda values: (values[places[0]],)) if places else (lambda values: ())


def _function(name: str, members: dict[str, Callable[..., Any]]) -> Any:
    statics = {each: staticmethod(function) for each, function in members.items()}
    return type(name, (torch.autograd.Function,), statics)


def _requires_grad(values: Sequence[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, list | tuple) and _requires_grad(value):
            return True
    return False


def _flat(values: Sequence[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list | tuple) else (value,))]


def shape_of(values: Sequence[Any]) -> Shape:
    return [len(value) if isinstance(value, list) else None for value in values]


def nested(flat: Sequence[Any], shape: Shape) -> Any:
    """Undoes `_flat`."""
    rest = iter(flat)
    return tuple(next(rest) if count is None else list(islice(rest, count)) for count in shape)
