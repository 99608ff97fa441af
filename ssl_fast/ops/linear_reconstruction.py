"""linear_reconstruction: a linear layer and an elementwise loss, without the layer's output.

The sum of the losses comes with its gradients from one pass of three products; they are made
without the reduction's factor, in fp32, and the backward weighs them. Gradients of gradients are
those of the reference formula, which stores the output in chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.backends.reference import linear_reconstruction as reference
from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.backends.reference.pointwise import KINDS
from ssl_fast.ops.arguments import check_tensor
from ssl_fast.ops.gradients import (
    apart,
    differentiated_again,
    graph_is_kept,
    open_signature,
    split_by_need,
    vector_jacobian,
    wants,
    watched,
    with_unsaved,
)
from ssl_fast.ops.registration import first_derivative_only, implementation, register

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["linear_reconstruction"]

TARGETS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
# input, linear_weight, linear_bias; then target, weight, mask and pos_weight.
DIFFERENTIABLE, TENSORS = 3, 7


def _check(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    pos_weight: Tensor | None,
    kind: str,
    *_: object,
) -> None:
    if input.dim() != 2 or not input.is_floating_point() or input.shape[1] < 1:
        raise ValueError(
            f"input must be a floating tensor [N, H], H at least 1; got {input.dtype} "
            f"{tuple(input.shape)}"
        )
    rows, depth = input.shape
    if linear_weight.dim() != 2:
        raise ValueError(f"linear_weight must have shape [D, H]; got {tuple(linear_weight.shape)}")
    outputs = linear_weight.shape[0]
    check_tensor("linear_weight", linear_weight, (outputs, depth), input.dtype, input)
    check_tensor("linear_bias", linear_bias, (outputs,), input.dtype, input)
    wide = accumulation_dtype(input)
    if target.dtype not in TARGETS and not target.dtype is wide is torch.float64:
        raise ValueError(
            "target must be float32, bfloat16, float16 or uint8, or float64 beside a float64 "
            f"input; got {target.dtype}"
        )
    check_tensor("target", target, (rows, outputs), target.dtype, input)
    for name, value, dtype in (("weight", weight, wide), ("mask", mask, torch.bool)):
        if value is not None:
            shape = (rows,) if value.dim() == 1 else (rows, outputs)
            check_tensor(name, value, shape, dtype, input)
    check_tensor("pos_weight", pos_weight, (outputs,), wide, input)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if pos_weight is not None and not kind.startswith("bce"):
        raise ValueError(f"pos_weight belongs to bce and bce_with_logits; got kind {kind!r}")


def _fake(
    input: Tensor, linear_weight: Tensor, _: Tensor | None, target: Tensor, *rest: Any, **__: str
) -> tuple[Tensor, ...]:
    elements, need_input, need_weight, need_bias = rest[-4:]
    wide = accumulation_dtype(input)
    return (
        input.new_empty(target.shape if elements else (), dtype=wide),
        input.new_empty(input.shape if need_input else (0,), dtype=wide),
        input.new_empty(linear_weight.shape if need_weight else (0,), dtype=wide),
        input.new_empty(linear_weight.shape[:1] if need_bias else (0,), dtype=wide),
    )


_linear_reconstruction = register(
    "linear_reconstruction(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    "Tensor? weight, Tensor? mask, Tensor? pos_weight, str kind, float parameter, "
    "float target_scale, float target_shift, bool elements, bool need_input, bool need_weight, "
    'bool need_bias, *, str backend="") -> (Tensor, Tensor, Tensor, Tensor)',
    implementation("linear_reconstruction", 1, "linear_reconstruction", _check),
    _fake,
)


class _Rules(NamedTuple):
    """What the loss is told beside its tensors."""

    kind: str
    parameter: float
    target_scale: float
    target_shift: float

    def formula(self, *tensors: Any, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        """The reference's gradients of what the tensors say, differentiable."""
        made: Any = reference.made
        gradients: tuple[Tensor, ...] = made(*tensors, *self, False, *needs)[1:]
        return gradients


def _weigh(weight: Tensor, grads: Sequence[Tensor], dtypes: Sequence[Any]) -> tuple[Tensor, ...]:
    """The gradients made, times ``weight`` []; one that was not made stays empty."""
    return tuple((g * weight).to(d) for g, d in zip(grads, dtypes, strict=True))


def _dtypes(tensors: Sequence[Tensor | None]) -> tuple[torch.dtype, ...]:
    # An absent bias has a gradient that nobody reads.
    return tuple(torch.float32 if x is None else x.dtype for x in tensors[:DIFFERENTIABLE])


class _Sum(Function):
    """The sum and its gradients from one operator. Inputs: rules, needs, backend, the tensors."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        rules, needs, backend, *tensors = inputs
        return _linear_reconstruction(*tensors, *rules, False, *needs, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rules, ctx.needs, _, *tensors = inputs
        ctx.unsaved = [None] * TENSORS
        ctx.dtypes = _dtypes(tensors)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight = grads[0]
        if weight is None:
            return (None,) * (3 + TENSORS)
        saved = ctx.saved_tensors
        tensors, made = saved[:TENSORS], saved[TENSORS:]
        needed = ctx.needs_input_grad[3 : 3 + DIFFERENTIABLE]
        if differentiated_again():
            arguments = (ctx.rules, ctx.needs, ctx.dtypes, ctx.unsaved, weight, *tensors, *made)
            found: Any = _WeightedGradient.apply(*arguments)  # type: ignore[no-untyped-call]
        elif torch.compiler.is_compiling():
            asking = [x for x, need in zip(tensors, needed, strict=False) if need]
            found = _weigh(first_derivative_only(weight, asking), made, ctx.dtypes)
        elif not watched() and not graph_is_kept():
            # The buffers go with the graph: a second copy of a wide layer's gradient is spared.
            found = [g.mul_(weight).to(d) for g, d in zip(made, ctx.dtypes, strict=True)]
        else:
            found = _weigh(weight, made, ctx.dtypes)
        wanted = [grad if need else None for grad, need in zip(found, needed, strict=True)]
        return None, None, None, *wanted, *(None,) * (TENSORS - DIFFERENTIABLE)


class _EagerSum(Function):
    """``_Sum`` where neither a transform nor torch.compile looks on; see ops/made_gradient.py."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        results = _Sum.forward(*inputs)
        ctx.rules, ctx.needs, _, *tensors = inputs
        saved, ctx.unsaved = split_by_need(tensors)
        ctx.dtypes = _dtypes(tensors)
        ctx.save_for_backward(*saved, *results[1:])
        ctx.set_materialize_grads(False)
        return results[0]

    backward = _Sum.backward


class _WeightedGradient(Function):
    """The gradients a sum made, weighted; their own gradient is the reference formula's.

    Inputs: rules, needs, dtypes, what autograd didn't save, the weight, the tensors, what was made.
    """

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        return _weigh(inputs[4], inputs[5 + TENSORS :], inputs[2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.rules, ctx.needs, ctx.dtypes, ctx.unsaved = inputs[:4]
        ctx.save_for_backward(*inputs[4 : 5 + TENSORS])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, *saved = ctx.saved_tensors
        tensors = with_unsaved(saved, ctx.unsaved)

        def formula(weight: Tensor, *values: Any) -> tuple[Tensor, ...]:
            full = (*values, *tensors[DIFFERENTIABLE:])
            return _weigh(weight, ctx.rules.formula(*full, needs=ctx.needs), ctx.dtypes)

        needed = ctx.needs_input_grad[4 : 5 + DIFFERENTIABLE]
        found = vector_jacobian(formula, (weight, *tensors[:DIFFERENTIABLE]), needed, grads)
        return *(None,) * 4, *found, *(None,) * (len(ctx.needs_input_grad) - 4 - len(found))


class _Elements(Function):
    """Each loss [N, D]; the gradient is made in the backward, for the weights it comes with.

    Inputs: rules, backend, the tensors.
    """

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        rules, backend, *tensors = inputs
        return _linear_reconstruction(*tensors, *rules, True, False, False, False, backend=backend)[
            0
        ]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.rules, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needed = ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE]
        arguments = (ctx.rules, needed, ctx.backend, grads[0].contiguous(), *ctx.saved_tensors)
        if differentiated_again():
            made: Any = _ElementsGradient.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            made = _ElementsGradient.forward(*arguments)
        wanted = [grad if need else None for grad, need in zip(made, needed, strict=True)]
        return None, None, *wanted, *(None,) * (TENSORS - DIFFERENTIABLE)


class _ElementsGradient(Function):
    """The gradients of weighted losses; their own gradient is the reference formula's.

    Inputs: rules, needs, backend, the losses' gradient [N, D], the tensors.
    """

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        rules, needs, backend, grad, *tensors = inputs
        tensors[4] = _times(grad, tensors[4])
        made = _linear_reconstruction(*tensors, *rules, False, *needs, backend=backend)[1:]
        return tuple(g.to(d) for g, d in zip(made, _dtypes(tensors), strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.rules, ctx.needs, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, *tensors = ctx.saved_tensors

        def formula(grad: Tensor, *values: Any) -> tuple[Tensor, ...]:
            full = [*values, *tensors[DIFFERENTIABLE:]]
            full[4] = _times(grad, full[4])
            made = ctx.rules.formula(*full, needs=ctx.needs)
            return tuple(g.to(d) for g, d in zip(made, _dtypes(tensors), strict=True))

        needed = ctx.needs_input_grad[3 : 4 + DIFFERENTIABLE]
        found = vector_jacobian(formula, (grad, *tensors[:DIFFERENTIABLE]), needed, grads)
        return *(None,) * 3, *found, *(None,) * (TENSORS - DIFFERENTIABLE)


def _times(grad: Tensor, weight: Tensor | None) -> Tensor:
    """The losses' gradient [N, D] times their own weight [N] or [N, D]."""
    if weight is None:
        return grad
    return grad * (weight if weight.dim() == 2 else weight[:, None])


def linear_reconstruction(
    input: Tensor,  # [N, H]
    linear_weight: Tensor,  # [D, H]
    linear_bias: Tensor | None,  # [D]
    target: Tensor,  # [N, D]
    weight: Tensor | None = None,  # [N] or [N, D]
    mask: Tensor | None = None,  # [N] or [N, D]
    pos_weight: Tensor | None = None,  # [D]
    *,
    kind: str,
    parameter: float = 1.0,
    target_scale: float = 1.0,
    target_shift: float = 0.0,
    reduce: bool,
    backend: str | None = None,
) -> Tensor:
    """``(weight * f(F.linear(input, linear_weight, linear_bias), target))[mask].sum()``.

    f is the elementwise loss of ``kind``, where bce is bce_with_logits whose targets are checked,
    and the target is ``target * target_scale + target_shift``. Without ``reduce`` the losses
    themselves, [N, D], 0 where the mask is False; their gradient takes the three products again.
    Differentiable in input, linear_weight and linear_bias, to any order. weight and pos_weight are
    fp32 (float64 beside a float64 input), mask is bool. A row of the input that the mask leaves
    out altogether may hold anything.
    """
    rules = _Rules(kind, parameter, target_scale, target_shift)
    linear_weight = apart(linear_weight, input)
    if linear_bias is not None:
        linear_bias = apart(linear_bias, input, linear_weight)
    tensors = (input, linear_weight, linear_bias, target, weight, mask, pos_weight)
    if not reduce:
        losses: Tensor = _Elements.apply(rules, backend or "", *tensors)  # type: ignore[no-untyped-call]
        return losses
    needs = tuple(wants(x) for x in tensors[:DIFFERENTIABLE])
    if watched():
        total: Tensor = _Sum.apply(rules, needs, backend or "", *tensors)[0]  # type: ignore[no-untyped-call]
    else:
        total = _EagerSum.apply(rules, needs, backend or "", *tensors)  # type: ignore[no-untyped-call]
    return total
