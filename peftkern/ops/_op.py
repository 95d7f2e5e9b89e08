"""Ops in two namespaces, `peftkern` (C++) and `peftkern_triton`, with one schema, one fake and one autograd formula.

A call is data: fakes and formulas get the arguments of `csrc/ops.cpp` as attributes of those names, and this file alone
knows where each stands. Triton and its kernels are imported when an op of the second namespace first runs.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from peftkern import backends
from peftkern._native import ops as _native_ops
from peftkern.ops._autograd import Plan, described, eager, getter, legacy_vmap, needed, vmap

_library = torch.library.Library("peftkern_triton", "DEF")
_native_library = torch.library.Library("peftkern", "IMPL")


class Call:
    """Values as attributes, such as the arguments of a call by the names of its schema."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__ = values  # without the copy of a SimpleNamespace


class _Restored(Call):
    """Those of a call that was saved, named when the first is asked for: most formulas only pass them on."""

    def __init__(self, names: Sequence[str], values: tuple[Any, ...]) -> None:
        self.__dict__ = {"_names": names, "_values": values}

    def __getattr__(self, name: str) -> Any:
        values = vars(self)
        if len(values) == 2:
            values.update(zip(values["_names"], values["_values"]))
            return getattr(self, name)
        raise AttributeError(name)


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
        self.values = [*self.names, *(result.name for result in schema.returns)]
        kinds = {argument.name: str(argument.type) for argument in schema.arguments}
        self.lists = [name for name in self.names if kinds[name] == "List[Tensor]"]
        self.tensors = [name for name in self.names if "Tensor" in kinds[name] and name not in self.lists]
        self.gives_lists = any(str(result.type) == "List[Tensor]" for result in schema.returns)
        self.backward_names: list[str] = []
        self._list_values = getter(self.names, self.lists)
        self._saves = saves
        self._plans: dict[tuple[tuple[str, ...], tuple[int, ...]], Plan] = {}
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
            self._backward_name, self.backward_names = backward_op.name, backward_op.names
        for ops in namespaces:
            op = getattr(ops.library, name).default
            torch.library.register_vmap(op, partial(vmap, op))
            (_native_library if ops is NATIVE else _library).impl(name, partial(legacy_vmap, op), "Batched")
            if backward is not None or of is not None:
                torch.library.register_autograd(op, partial(self._library_backward, ops), setup_context=self.save)
                setattr(ops, name, eager(self, ops, op))

    def _named(self, function: Callable[[Call], Any]) -> Callable[..., Any]:
        return lambda *inputs: function(Call(dict(zip(self.names, inputs))))

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """What torch calls setup_context. Only the first result is differentiable."""
        if self._of is not None:  # none is, see `gradients`
            ctx.plan = Plan(self, (), tuple(map(len, self._list_values(inputs))))
            return
        results = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # no zeros for these
        saves = self._saves
        if callable(saves):
            saves = saves(Call(dict(zip(self.names, inputs))))
        counts = tuple(map(len, self._list_values(inputs)))
        plan = self._plans.get((saves, counts))
        if plan is None:
            plan = self._plans[saves, counts] = Plan(self, saves, counts)
        plan.save(ctx, (*inputs, *results))
        if self.gives_lists:
            ctx.differentiable = described(results[0])

    def gradients(self, ops: Namespace, ctx: Any, needs: dict[str, Any], grad: Any) -> dict[str, Any]:
        """What the formula finds; nothing where a later op gave no gradient."""
        if self._of is not None:
            raise RuntimeError(
                f"{self._of}: double backward is not implemented; use backend='reference' for second derivatives"
            )
        if isinstance(grad, list):
            grad = _without_gaps(grad, ctx.differentiable)
        if grad is None:
            return {}
        plan = ctx.plan
        values = plan.restored(ctx)

        def run(**given: Any) -> Any:
            return getattr(ops, self._backward_name)(*plan.backward_arguments(values, given))

        assert self._formula is not None
        return self._formula(run, _Restored(plan.names, values), Call(needs), grad)

    def _library_backward(self, ops: Namespace, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The formula as torch.library wants it: lists as lists."""
        needs = dict(zip(self.names, ctx.needs_input_grad))
        found = self.gradients(ops, ctx, needs, grads[0])
        return tuple(
            needed(needs[name], found.get(name))
            if name in self.lists
            else (found.get(name) if needs[name] is True else None)
            for name in self.names
        )


def _without_gaps(grads: list[Any], results: list[Any]) -> list[Any] | None:
    """Zeros where a result got no gradient; None if none did."""
    given = next((grad for grad in grads if grad is not None), None)
    if given is None:
        return None
    return [
        given.new_zeros(result.shape, dtype=result.dtype) if grad is None else grad
        for grad, result in zip(grads, results)
    ]


def _run_triton(module: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(f"peftkern.ops.{module}"), name)(*args)
