"""l2_sp: half the squared distance of many tensors from where they began, in one pass over all.

The backward reads them again and writes every gradient with its factor; ``accumulate_l2_sp`` takes
the value and adds the gradients where they belong in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.backends import dispatch
from ssl_fast.backends.reference import l2_sp as reference
from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.ops.arguments import check_tensor
from ssl_fast.ops.gradients import differentiated_again, open_signature, vector_jacobian
from ssl_fast.ops.registration import elementwise, first_derivative_only, register

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["accumulate_l2_sp", "l2_sp"]


def _check_like(name: str, tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
    """The shapes of the parameters, and the dtype and device of the first."""
    first = parameters[0]
    dtype, device = first.dtype, first.device
    for place, (x, parameter) in enumerate(zip(tensors, parameters, strict=True)):
        # Names are made for an error alone: there are hundreds of tensors.
        if x is None or (
            x.dtype is dtype
            and x.device == device
            and (x is parameter or x.shape == parameter.shape)
        ):
            continue
        check_tensor(f"{name}[{place}]", x, parameter.shape, dtype, first)


def _check(parameters: Sequence[Tensor], anchors: Sequence[Tensor], *_: object) -> None:
    if not parameters or len(parameters) != len(anchors):
        raise ValueError(
            f"parameters and anchors must be as many, one at least; got {len(parameters)} and "
            f"{len(anchors)}"
        )
    first = parameters[0]
    if not first.is_floating_point():
        raise ValueError(f"parameters must be floating; got {first.dtype}")
    _check_like("parameters", parameters, parameters)
    _check_like("anchors", anchors, parameters)


def _check_backward(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grad_value: Tensor,
    _weight: float,
    needed: Sequence[bool],
) -> None:
    _check(parameters, anchors)
    check_tensor("grad_value", grad_value, (), accumulation_dtype(parameters[0]), parameters[0])
    if len(needed) != len(parameters):
        raise ValueError(f"needed must have {len(parameters)} entries; got {len(needed)}")


def _fake(parameters: Sequence[Tensor], *_: object, **__: str) -> Tensor:
    return parameters[0].new_empty((), dtype=accumulation_dtype(parameters[0]))


def _fake_backward(parameters: Sequence[Tensor], *rest: Any, **_: str) -> list[Tensor]:
    return [
        torch.empty_like(x) if need else x.new_empty(0)
        for x, need in zip(parameters, rest[-1], strict=True)
    ]


_l2_sp = register(
    'l2_sp(Tensor[] parameters, Tensor[] anchors, float weight, *, str backend="") -> Tensor',
    elementwise("l2_sp", "l2_sp", _check),
    _fake,
)
_l2_sp_backward = register(
    "l2_sp_backward(Tensor[] parameters, Tensor[] anchors, Tensor grad_value, float weight, "
    'bool[] needed, *, str backend="") -> Tensor[]',
    elementwise("l2_sp_backward", "l2_sp", _check_backward),
    _fake_backward,
)


def _split(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and anchors, which autograd takes and saves in one row."""
    half = len(tensors) // 2
    return list(tensors[:half]), list(tensors[half:])


class _L2Sp(Function):
    """Inputs: weight, backend, the parameters, the anchors."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        weight, backend, *tensors = inputs
        return _l2_sp(*_split(tensors), weight, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.weight, ctx.backend = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_value = grads[0]
        parameters, anchors = _split(ctx.saved_tensors)
        needed = list(ctx.needs_input_grad[2 : 2 + len(parameters)])
        if differentiated_again():
            rules = (ctx.weight, ctx.backend, needed)
            found: Any = _L2SpGradient.apply(  # type: ignore[no-untyped-call]
                *rules, grad_value, *ctx.saved_tensors
            )
        else:
            if torch.compiler.is_compiling():
                asking = [x for x, need in zip(parameters, needed, strict=True) if need]
                grad_value = first_derivative_only(grad_value, asking)
            found = _l2_sp_backward(
                parameters, anchors, grad_value, ctx.weight, needed, backend=ctx.backend
            )
        wanted = (x if need else None for x, need in zip(found, needed, strict=True))
        return None, None, *wanted, *(None,) * len(anchors)


class _L2SpGradient(Function):
    """The gradients of l2_sp; their own gradient is the reference formula's.

    Inputs: weight, backend, the needs, grad_value, the parameters, the anchors.
    """

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        weight, backend, needed, grad_value, *tensors = inputs
        found = _l2_sp_backward(*_split(tensors), grad_value, weight, needed, backend=backend)
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.weight, _, ctx.needs = inputs[:3]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        def formula(grad_value: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                reference.l2_sp_backward(*_split(tensors), grad_value, ctx.weight, ctx.needs)
            )

        needed = ctx.needs_input_grad[3:]
        return None, None, None, *vector_jacobian(formula, ctx.saved_tensors, needed, grads)


def l2_sp(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    weight: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """``weight / 2 * sum((p - a).square().sum() for p, a in zip(parameters, anchors))``.

    All of one dtype and on one device. Differentiable in the parameters, to any order; the anchors
    get no gradient.
    """
    fixed = [x.detach() for x in anchors]
    value: Tensor = _L2Sp.apply(weight, backend or "", *parameters, *fixed)  # type: ignore[no-untyped-call]
    return value


def accumulate_l2_sp(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    weight: float,
    *,
    add: bool,
    backend: str | None = None,
) -> Tensor:
    """The value without a gradient; weight * (parameter - anchor) goes into ``grads``.

    It is added to what they hold, or written there; None stands for a parameter that gets none.
    """
    _check(parameters, anchors)
    _check_like("grads", grads, parameters)
    first = parameters[0]
    module = dispatch.select("l2_sp", first.device.type, first.dtype, (1,), backend)
    with torch.no_grad():
        value: Tensor = module.l2_sp_accumulate(parameters, anchors, grads, weight, add)
    return value
