"""Ops in two namespaces, `peftkern` (C++) and `peftkern_triton`, with one schema, one fake and one autograd formula.

A call is data: fakes and formulas get the arguments of `csrc/ops.cpp` as attributes of those names, and this file alone
knows where each stands. Triton and its kernels are imported when an op of the second namespace first runs.

torch.library dispatches an op that has a formula to Python and back twice, which takes longer than the products of a
small layer: 75 us against 22 us for a 16 x 16 lora_linear. Eager calls therefore go to one autograd.Function, to which
lists are given flat; torch.compile, torch.export and modes see the op itself, torch.func a Function of its own kind.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peftkern import backends
from peftkern._native import ops as _native_ops

_library = torch.library.Library("peftkern_triton", "DEF")


class Call:
    """Values as attributes, such as the arguments of a call by the names of its schema."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__ = values  # without the copy of a SimpleNamespace

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no {name} among {', '.join(vars(self))}")


# grads = formula(run, call, needs, grad): `run` runs the op's backward, whose arguments are those of `call` beside the
# ones that it is given; `needs` says of each name, or of each entry of a list, whether a gradient is wanted; `grad` is
# that of the first result, a tensor or a list of them. The others have none. Unwanted gradients may be among grads.
Formula = Callable[[Callable[..., Any], Call, Call, Any], dict[str, Any]]


class Namespace:
    """Ops as attributes, called by position: as `Op` makes them, else as torch.library has them."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)


NATIVE, TRITON = Namespace(_native_ops), Namespace(torch.ops.peftkern_triton)
# Of each implementation; the device of the tensors tells C++ and CUDA apart.
NAMESPACES = {"cpu": NATIVE, "cuda": NATIVE, "triton": TRITON}


class Unsaved(NamedTuple):
    """What a formula knows of a tensor that was not saved."""

    shape: torch.Size
    dtype: torch.dtype


class _Record:
    """What a Function is given beside its tensors. No pytree: torch.func hands it through as it is."""

    __slots__ = ("inputs", "shape")

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs
        # Of the results, as `_shape` gives it.
        self.shape: list[int | None] = []


class _Plan:
    """Where the tensors to save stand among a call's arguments and results, and what is kept of the others."""

    def __init__(
        self, names: Sequence[str], tensors: Sequence[str], lists: Sequence[str], saves: Sequence[str]
    ) -> None:
        singles = [name for name in saves if name not in lists]
        self._lists = [name for name in saves if name in lists]
        rest = [name for name in names if name not in saves and (name in tensors or name in lists)]
        plain = [name for name in names if name not in (*saves, *rest)]
        self._singles, self._list_places = _getter(names, singles), [names.index(name) for name in self._lists]
        self._plain, self._rest = _getter(names, plain), [names.index(name) for name in rest]
        self._names = (*plain, *rest, *singles)

    def save(self, ctx: Any, values: tuple[Any, ...]) -> None:
        tensors, counts = self._singles(values), []
        for i in self._list_places:
            tensors += tuple(values[i])
            counts.append(len(values[i]))
        ctx.save_for_backward(*tensors)
        ctx.kept = self, (*self._plain(values), *[_described(values[i]) for i in self._rest]), counts

    def restored(self, tensors: tuple[Any, ...], kept: tuple[Any, ...], counts: list[int]) -> dict[str, Any]:
        values = dict(zip(self._names, kept + tensors))
        first = len(self._names) - len(kept)
        for name, count in zip(self._lists, counts):
            values[name] = list(tensors[first : first + count])
            first += count
        return values


class Op:
    """One op: registers what it has beside its kernels.

    Args:
        name: in `csrc/ops.cpp`.
        fake: the results' shapes, from the call.
        backward: the autograd formula; the op `<name>_backward` is registered with it, and has no derivative.
        saves: the names of what it reads, arguments and results; of the other arguments it sees shape and dtype. Or a
            function of the call that gives them.
        fake_backward: the shapes of `<name>_backward`'s results.
        triton: the module of `peftkern.ops` whose functions of these names are the Triton implementation.
        backward_on_cuda: the op `<name>_backward` for CUDA tensors where that is Python.
        of: the op that this is the backward of.
    """

    def __init__(
        self,
        name: str,
        fake: Callable[[Call], Any],
        backward: Formula | None = None,
        saves: tuple[str, ...] | Callable[[Call], tuple[str, ...]] = (),
        fake_backward: Callable[[Call], Any] | None = None,
        *,
        triton: str | None = None,
        backward_on_cuda: Callable[[Call], Any] | None = None,
        of: str | None = None,
    ) -> None:
        schema = getattr(_native_ops, name).default._schema
        self.name = name
        self.names = [argument.name for argument in schema.arguments]
        self._values = [*self.names, *(result.name for result in schema.returns)]
        kinds = {argument.name: str(argument.type) for argument in schema.arguments}
        self._lists = [name for name in self.names if kinds[name] == "List[Tensor]"]
        self._tensors = [name for name in self.names if "Tensor" in kinds[name] and name not in self._lists]
        self._list_places = [self.names.index(name) for name in self._lists]
        self._single_tensors = _getter(self.names, self._tensors)
        self._gives_lists = any(str(result.type) == "List[Tensor]" for result in schema.returns)
        self._saves = saves
        self._plans: dict[tuple[str, ...], _Plan] = {}
        self._formula = backward
        self._of = of

        torch.library.register_fake(f"peftkern::{name}", self._named(fake))
        namespaces = [NATIVE]
        if triton is not None:
            _library.define(str(schema).removeprefix("peftkern::"))
            for device in ("CUDA", "CPU"):  # the CPU under Triton's interpreter; `backends.choose` has checked that
                _library.impl(name, partial(_run_triton, triton, name), device)
            torch.library.register_fake(f"peftkern_triton::{name}", self._named(fake))
            backends.TRITON_OPS.add(name)
            namespaces.append(TRITON)
        if fake_backward is not None:
            backward_op = Op(f"{name}_backward", fake_backward, triton=triton, of=name)
            if backward_on_cuda is not None:
                torch.library.impl(f"peftkern::{backward_op.name}", "cuda", backward_op._named(backward_on_cuda))
            self._backward_name, self._backward_arguments = backward_op.name, itemgetter(*backward_op.names)
        for ops in namespaces:
            op = getattr(ops.library, name).default
            torch.library.register_vmap(op, partial(_vmap, op))
            if backward is not None or of is not None:
                torch.library.register_autograd(op, partial(self._library_backward, ops), setup_context=self._save)
                setattr(ops, name, self._eager(ops, op))

    def _named(self, function: Callable[[Call], Any]) -> Callable[..., Any]:
        return lambda *inputs: function(Call(dict(zip(self.names, inputs))))

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._of is not None:  # has no derivative, in any of its results
            return
        results = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # no zeros for these
        saves = self._saves
        if callable(saves):
            saves = saves(Call(dict(zip(self.names, inputs))))
        plan = self._plans.get(saves)
        if plan is None:
            plan = self._plans[saves] = _Plan(self._values, self._tensors, self._lists, saves)
        plan.save(ctx, (*inputs, *results))
        if isinstance(results[0], list):
            ctx.differentiable = _described(results[0])

    def _gradients(self, ops: Namespace, ctx: Any, needs: dict[str, Any], grad: Any) -> dict[str, Any]:
        """What the formula finds; nothing where a later op gave no gradient."""
        if self._formula is None:
            raise RuntimeError(
                f"{self._of}: double backward is not implemented; use backend='reference' for second derivatives"
            )
        if isinstance(grad, list):
            given = next((each for each in grad if each is not None), None)
            if given is not None:
                grad = [
                    given.new_zeros(result.shape, dtype=result.dtype) if each is None else each
                    for each, result in zip(grad, ctx.differentiable)
                ]
            grad = None if given is None else grad
        if grad is None:
            return {}
        plan, kept, counts = ctx.kept
        values = plan.restored(ctx.saved_tensors, kept, counts)

        def run(**given: Any) -> Any:
            return getattr(ops, self._backward_name)(*self._backward_arguments({**values, **given}))

        return self._formula(run, Call(values), Call(needs), grad)

    def _library_backward(self, ops: Namespace, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The formula as torch.library wants it: lists as lists."""
        needs = dict(zip(self.names, ctx.needs_input_grad))
        found = self._gradients(ops, ctx, needs, grads[0])
        return tuple(
            _needed(needs[name], found.get(name)) if name in self._lists or needs[name] is True else None
            for name in self.names
        )

    def _eager(self, ops: Namespace, op: Any) -> Callable[..., Any]:
        """The op for calls by position, with the formula at hand where nothing is traced."""
        below_autograd = torch._C._AutoDispatchBelowAutograd

        def forward(ctx: Any, record: _Record, *tensors: Any) -> Any:
            with below_autograd():
                output = op(*record.inputs)
            self._save(ctx, record.inputs, output)
            ctx.counts = [len(record.inputs[i]) for i in self._list_places]
            if self._gives_lists:
                ctx.shape = record.shape = _shape(output)
                return tuple(_flat(output))
            return output

        def backward(ctx: Any, *grads: Any) -> Any:
            flags = ctx.needs_input_grad[1:]
            needs = dict(zip(self._tensors, flags))
            first = len(needs)
            for name, count in zip(self._lists, ctx.counts):
                needs[name] = flags[first : first + count]
                first += count
            grad = _nested(grads, ctx.shape)[0] if self._gives_lists else grads[0]
            found = self._gradients(ops, ctx, needs, grad)
            wanted = [None, *[found.get(name) if needs[name] else None for name in self._tensors]]
            for name in self._lists:
                wanted += _needed(needs[name], found.get(name))
            return tuple(wanted)

        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(f"{self.name}: forward mode is not implemented; use backend='reference' for it")

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward), "jvp": staticmethod(jvp)}
        function: Any = type(f"{self.name}_function", (torch.autograd.Function,), members)
        # Function.apply first looks for what torch.func has left behind: 4 us of 90.
        apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

        # torch.func gives a Function its tensors at each level, as arguments, and sees what it saves in setup_context.
        def filled(record: _Record, tensors: Sequence[Any]) -> tuple[Any, ...]:
            values, rest = dict(zip(self.names, record.inputs)), iter(tensors)
            values |= zip(self._tensors, rest)
            values |= {name: list(islice(rest, len(values[name]))) for name in self._lists}
            return tuple(values.values())

        def forward_alone(record: _Record, *tensors: Any) -> Any:
            with below_autograd():
                output = op(*filled(record, tensors))
            if self._gives_lists:
                record.shape = _shape(output)
                return tuple(_flat(output))
            return output

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            record, *tensors = inputs
            self._save(ctx, filled(record, tensors), _nested(output, record.shape) if self._gives_lists else output)
            ctx.counts, ctx.shape = [len(record.inputs[i]) for i in self._list_places], record.shape

        members |= {"forward": staticmethod(forward_alone), "setup_context": staticmethod(setup_context)}
        transformed: Any = type(f"{self.name}_transformed", (function,), {**members, "generate_vmap_rule": True})

        def call(*inputs: Any) -> Any:
            if torch.compiler.is_compiling():
                return op(*inputs)
            if torch._C._functorch.peek_interpreter_stack() is not None:
                run = transformed.apply
            elif torch._C._len_torch_dispatch_stack() > 0:
                return op(*inputs)
            elif not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)) and (
                forward_ad._current_level < 0
            ):
                with below_autograd():
                    return op(*inputs)
            else:
                run = apply
            tensors = self._single_tensors(inputs)
            for i in self._list_places:
                tensors += tuple(inputs[i])
            record = _Record(inputs)
            output = run(record, *tensors)
            return _nested(output, record.shape) if self._gives_lists else output

        return call


def _getter(names: Sequence[str], wanted: Sequence[str]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function of values by `names` that gives those that are wanted."""
    places = [names.index(name) for name in wanted]
    if len(places) > 1:
        return itemgetter(*places)
    return (lambda values: (values[places[0]],)) if places else (lambda values: ())


def _run_triton(module: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(f"peftkern.ops.{module}"), name)(*args)


def _described(value: Any) -> Any:
    if isinstance(value, list):
        return [_described(each) for each in value]
    return None if value is None else Unsaved(value.shape, value.dtype)


def _needed(needs: Sequence[bool] | bool, grads: Any) -> Any:
    """The gradients that are needed, None for the others."""
    if not isinstance(needs, Sequence):
        return grads if needs else None
    if grads is None:
        return [None] * len(needs)
    return [grad if need else None for need, grad in zip(needs, grads, strict=True)]


def _flat(values: Sequence[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list) else (value,))]


def _shape(values: Sequence[Any]) -> list[int | None]:
    """Of lists their lengths, of the others None."""
    return [len(value) if isinstance(value, list) else None for value in values]


def _nested(flat: Sequence[Any], shape: list[int | None]) -> Any:
    """Undoes `_flat`."""
    rest = iter(flat)
    return tuple(next(rest) if count is None else list(islice(rest, count)) for count in shape)


def _vmap(op: Any, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """One call after the other, as torch does by itself for ops without lists."""

    def part(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, list) and isinstance(dim, list):
            return [part(each, of, i) for each, of in zip(value, dim)]
        return value if dim is None else value.select(dim, i)

    outputs = [op(*(part(value, dim, i) for value, dim in zip(args, in_dims))) for i in range(info.batch_size)]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    shape = _shape(outputs[0])
    together = _nested([torch.stack(each) for each in zip(*map(_flat, outputs))], shape)
    return together, _nested([0] * len(_flat(together)), shape)
