"""Losses whose forward pass makes their gradient: the backward only weighs what was made.

Every row of a mean or a sum weighs the same, so the gradient needs only one factor. Gradients of
gradients are those of the reference formula, which stores the pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.ops.gradients import (
    differentiated_again,
    open_signature,
    split_by_need,
    vector_jacobian,
    watched,
    with_unsaved,
)
from ssl_fast.ops.registration import first_derivative_only

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Plan", "reduced_loss"]


class Plan(Protocol):
    """What a loss is told beside its tensors, and how it is computed from them."""

    @property
    def rows(self) -> int:
        """How many of the operator's results are numbers per row, the loss the first of them."""

    @property
    def inputs(self) -> int:
        """How many of the tensors have a gradient; they come first."""

    @property
    def mean(self) -> bool:
        """The mean over rows, or their sum."""

    def operator(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The results per row, then the gradients that were made."""

    def formula(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The same of the reference."""

    def per_input(self, made: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients for each input; the last is that of a scalar, a part per row [N]."""


def _weigh_one(weight: Tensor, grad: Tensor) -> Tensor:
    if weight.dtype is grad.dtype:
        return grad * weight
    # In fp32, which a scalar tensor wouldn't enforce: weight may be below fp16's smallest.
    return (grad * weight.view(1)).to(grad.dtype)


def _weigh(weight: Tensor, made: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients that a loss made for its inputs, times ``weight`` []."""
    *grads, of_scalar = made
    return *(_weigh_one(weight, grad) for grad in grads), of_scalar.sum() * weight


class _Loss(Function):
    """The loss and its gradient from one operator. Inputs: the plan, then its tensors."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        plan, *tensors = inputs
        loss, *others = plan.operator(*tensors)
        return loss.mean() if plan.mean else loss.sum(), *others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan, *tensors = inputs
        ctx.unsaved = [None] * len(tensors)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[ctx.plan.rows :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight = grads[0]
        if weight is None:
            return (None,) * len(ctx.needs_input_grad)
        plan, count = ctx.plan, len(ctx.unsaved)
        tensors, made = ctx.saved_tensors[:count], plan.per_input(ctx.saved_tensors[count:])
        needed = ctx.needs_input_grad[1 : 1 + plan.inputs]
        if plan.mean:
            # An empty batch has a mean of NaN and a gradient of 0, as in torch.
            weight = weight / max(made[-1].shape[0], 1)
        if differentiated_again():
            arguments = (plan, ctx.unsaved, weight, *tensors, *made)
            found: Any = _WeightedGradient.apply(*arguments)  # type: ignore[no-untyped-call]
            wanted = [grad if need else None for grad, need in zip(found, needed, strict=True)]
        else:
            if torch.compiler.is_compiling():
                asking = [x for x, need in zip(tensors, needed, strict=False) if need]
                weight = first_derivative_only(weight, asking)
            wanted = [
                _weigh_one(weight, grad) if need else None
                for grad, need in zip(made[:-1], needed, strict=False)
            ]
            wanted.append(made[-1].sum() * weight if needed[-1] else None)
        return None, *wanted, *(None,) * (count - plan.inputs)


class _EagerLoss(Function):
    """``_Loss`` where neither a transform nor torch.compile looks on.

    Without ``setup_context``, ``apply`` binds no default arguments, and what the backward needs is
    saved without passing through autograd as an output: 20 of 92 µs in a call. What needs no
    gradient is not saved, and may be overwritten before the backward.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        results = _Loss.forward(*inputs)
        ctx.plan, *tensors = inputs
        rows = ctx.plan.rows
        saved, ctx.unsaved = split_by_need(tensors)
        ctx.mark_non_differentiable(*results[1:rows])
        ctx.save_for_backward(*saved, *results[rows:])
        ctx.set_materialize_grads(False)
        return results[:rows]

    backward = _Loss.backward


class _WeightedGradient(Function):
    """The gradients a loss made, weighted; their own gradient is the reference formula's.

    Inputs: the plan, what autograd didn't save, the weight, the tensors, the gradients made.
    """

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        return _weigh(inputs[2], inputs[3 + len(inputs[1]) :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.plan, ctx.unsaved = inputs[:2]
        ctx.save_for_backward(*inputs[2 : 3 + len(ctx.unsaved)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan = ctx.plan
        weight, *saved = ctx.saved_tensors
        tensors = with_unsaved(saved, ctx.unsaved)
        inputs, others = tensors[: plan.inputs], tensors[plan.inputs :]

        def formula(weight: Tensor, *values: Any) -> tuple[Tensor, ...]:
            made = plan.formula(*values, *others)[plan.rows :]
            return _weigh(weight, plan.per_input(made))

        needed = ctx.needs_input_grad[2 : 3 + plan.inputs]
        found = vector_jacobian(formula, (weight, *inputs), needed, grads)
        return None, None, *found, *(None,) * (len(ctx.needs_input_grad) - 2 - len(found))


def reduced_loss(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The mean or sum of the losses, differentiable, and the other results per row, which aren't.

    A tensor that needs no gradient may be overwritten between the forward and the backward.
    """
    function = _Loss if watched() else _EagerLoss
    results: Any = function.apply(plan, *tensors)  # type: ignore[no-untyped-call]
    return tuple(results[: plan.rows])
