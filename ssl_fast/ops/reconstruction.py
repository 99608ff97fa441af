"""reconstruction: an elementwise loss, summed, and its gradient in one pass over memory.

The forward pass writes the gradient, in the input's dtype and with the reduction's factor, so that
the backward of a loss that is not scaled has nothing left to do. In fp16 a factor like 1/N would
lose it: there it is saved without, and multiplied by grad_output and the factor in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.backends.reference import reconstruction as reference
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
    weighed,
    with_unsaved,
)
from ssl_fast.ops.registration import elementwise, empty_like, first_derivative_only, register

__all__ = ["Rules", "reconstruction"]


class Rules(NamedTuple):
    """Which loss, and how it is reduced."""

    kind: str
    parameter: float = 1.0  # smooth_l1's beta, huber's delta
    target_scale: float = 1.0
    target_shift: float = 0.0
    factor: float = 1.0  # of the sum
    reduce: bool = True


def _check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    pos_weight: Tensor | None,
    kind: int,
    *_: object,
) -> None:
    if not input.is_floating_point():
        raise ValueError(f"input must be floating; got {input.dtype}")
    wide, shape = accumulation_dtype(input), tuple(input.shape)
    if target.dtype is not torch.uint8 and (
        not target.is_floating_point() or accumulation_dtype(target) is not wide
    ):
        raise ValueError(
            f"target must be floating, float64 beside float64, or uint8; got {target.dtype}"
        )
    check_tensor("target", target, shape, target.dtype, input)
    check_tensor("weight", weight, shape, wide, input)
    if mask is not None:
        check_tensor("mask", mask, shape[: mask.dim()], torch.bool, input)
    if pos_weight is not None:
        check_tensor("pos_weight", pos_weight, shape[len(shape) - pos_weight.dim() :], wide, input)
    if not 0 <= kind < len(KINDS):
        raise ValueError(f"kind must be the place of one of {', '.join(KINDS)}; got {kind}")


def _fake(input: Tensor, *rest: Any, **_: str) -> tuple[Tensor, Tensor]:
    reduce, need_grad = rest[-2:]
    value = input.new_empty(() if reduce else input.shape, dtype=accumulation_dtype(input))
    return value, empty_like(input, need_grad, input)


_ARGUMENTS = (
    "Tensor target, Tensor? weight, Tensor? mask, Tensor? pos_weight, int kind, float parameter, "
    "float target_scale, float target_shift, float factor, float grad_factor"
)
_reconstruction = register(
    f"reconstruction(Tensor input, {_ARGUMENTS}, bool reduce, bool need_grad, *, "
    'str backend="") -> (Tensor, Tensor)',
    elementwise("reconstruction", "reconstruction", _check),
    _fake,
)
_reconstruction_ = register(
    f'reconstruction_(Tensor(a!) input, {_ARGUMENTS}, *, str backend="") -> Tensor',
    elementwise("reconstruction_", "reconstruction", _check),
    lambda *inputs, **_: inputs[0].new_empty((), dtype=accumulation_dtype(inputs[0])),
)


def _factors(input: Tensor, rules: Rules) -> tuple[float, float]:
    """The gradient's factor in the forward pass, and what is left for the backward."""
    if input.dtype is torch.float16:
        return 1.0, rules.factor
    return rules.factor, 1.0


def _numbers(rules: Rules, grad_factor: float) -> tuple[int | float, ...]:
    kind, *others, factor, _ = rules
    return KINDS.index(kind), *others, factor, grad_factor


def _weigh(weight: Tensor, grad: Tensor, left: float) -> Tensor:
    return weighed(weight if left == 1.0 else weight * left, grad, grad.dtype)


class _Loss(Function):
    """Inputs: input, target, weight, mask, pos_weight, the rules, need_grad, backend."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *tensors, rules, need_grad, backend = inputs
        numbers = _numbers(rules, _factors(tensors[0], rules)[0])
        return _reconstruction(*tensors, *numbers, rules.reduce, need_grad, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.rules, _, _ = inputs
        ctx.unsaved = [None] * len(tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        nothing, weight = (None,) * 7, grads[0]
        if weight is None:
            return None, *nothing
        *tensors, made = ctx.saved_tensors
        left = _factors(made, ctx.rules)[1]
        if differentiated_again():
            arguments = (*tensors, made, weight, ctx.rules, ctx.unsaved)
            found: Any = _Gradient.apply(*arguments)  # type: ignore[no-untyped-call]
            return found, *nothing
        if torch.compiler.is_compiling():
            return _weigh(first_derivative_only(weight, tensors[:1]), made, left), *nothing
        return _weigh(weight, made, left), *nothing


class _EagerLoss(Function):
    """``_Loss`` where neither a transform nor torch.compile looks on; see ops/made_gradient.py."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        value, made = _Loss.forward(*inputs)
        *tensors, ctx.rules, _, _ = inputs
        saved, ctx.unsaved = split_by_need(tensors)
        ctx.save_for_backward(*saved, made)
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight = grads[0]
        # The gradient itself where nothing is left to multiply it with; a copy where the graph is
        # kept, since whoever gets it may write to it before the next backward.
        if (
            weight is not None
            and weight.dim() == 0
            and weight.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not watched()
            and not torch._C._functorch.is_legacy_batchedtensor(weight)  # of is_grads_batched
        ):
            made = ctx.saved_tensors[-1]
            if _factors(made, ctx.rules)[1] == 1.0 and float(weight) == 1.0:
                return made.clone() if graph_is_kept() else made, *(None,) * 7
        return _Loss.backward(ctx, *grads)


class _Gradient(Function):
    """The gradient that was made, weighted; its own gradient is the reference formula's.

    Inputs: input, target, weight, mask, pos_weight, the gradient made, its weight, the rules, what
    autograd didn't save.
    """

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        made, weight, rules = inputs[5:8]
        return _weigh(weight, made, _factors(made, rules)[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.rules, ctx.unsaved = inputs[7:]
        ctx.save_for_backward(*inputs[:5], inputs[6])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *saved, weight = ctx.saved_tensors
        given, *others = with_unsaved(saved, ctx.unsaved)
        kind, *line, factor, _ = ctx.rules

        def formula(input: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            slopes: Any = reference.slopes
            return ((slopes(input, *others, kind, *line) * (weight * factor)).to(input.dtype),)

        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[6])
        found = vector_jacobian(formula, (given, weight), needed, grads)
        return found[0], *(None,) * 5, found[1], None, None


class _Inplace(Function):
    """The input's storage becomes its gradient. Inputs as ``_Loss``, without need_grad."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *tensors, ctx.rules, backend = inputs
        given = tensors[0]
        grad_factor, ctx.left = _factors(given, ctx.rules)
        numbers = _numbers(ctx.rules, grad_factor)
        try:
            value = _reconstruction_(*tensors, *numbers, backend=backend)
        except ValueError:
            # The pass that found a number out of range has written over the input all the same.
            torch.autograd.graph.increment_version(given)
            raise
        ctx.mark_dirty(given)
        ctx.save_for_backward(given)
        ctx.set_materialize_grads(False)
        ctx.taken = False
        return value, given

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, of_input = grads
        if of_input is not None:
            raise RuntimeError(
                "the input of a loss with inplace=True has become its gradient: it can't be used "
                "after the loss"
            )
        if torch.is_grad_enabled():
            raise RuntimeError("a loss with inplace=True has no second derivative")
        if ctx.taken:
            raise RuntimeError(
                "a loss with inplace=True can go backward once: its gradient has been given away"
            )
        ctx.taken = True
        (made,) = ctx.saved_tensors
        made = made.detach()
        if weight is None:
            return (None,) * 7
        if weight.device.type != "cpu" or ctx.left != 1.0 or float(weight) != 1.0:
            scale = weight * ctx.left
            made.mul_(scale.view((1,) * made.dim())) if made.dim() > 0 else made.mul_(scale)
        return made, *(None,) * 6


def _differentiable(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], rules: Rules
) -> Tensor:
    """The reference formula under autograd, for gradients of more than the input."""
    kind, *line, factor, reduce = rules
    input, target, _, mask, _ = tensors
    if kind == "bce" and not watched() and input.device.type == "cpu":
        reference.check_range(input.detach(), target.detach(), mask, *line[1:])
    losses: Any = reference.losses
    found: Tensor = losses(*tensors, kind, *line)
    return found.sum() * factor if reduce else found


def reconstruction(
    input: Tensor,
    target: Tensor,
    rules: Rules,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    pos_weight: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``factor * torch.sum(mask * weight * F.<kind>(input, target, reduction="none"))``, in nats.

    Or the losses, without ``reduce``. input, target (also uint8, read as target_scale * target +
    target_shift) and weight have one shape; mask (bool) has leading dimensions of it, pos_weight
    trailing ones. weight, pos_weight and the result are fp32, float64 beside a float64 input.
    What the mask leaves out takes no part, whatever it holds. Differentiable in input, to any
    order, and by the reference formula in target, weight and pos_weight. ``inplace`` turns a
    contiguous input into its gradient. On the CPU kind "bce" raises ValueError for numbers outside
    [0, 1].
    """
    tensors = (input, target, weight, mask, pos_weight)
    asked = wants(input)
    if any(wants(other) for other in (target, weight, pos_weight)):
        _check(*tensors, KINDS.index(rules.kind))
        return _differentiable(tensors, rules)
    if watched():
        others = [None if other is None else apart(other, input) for other in tensors[1:]]
        arguments = (input, *others, rules, asked, backend or "")
        found: Any = _Loss.apply(*arguments)  # type: ignore[no-untyped-call]
        return found[0]  # type: ignore[no-any-return]
    if inplace and asked:
        taken: Any = _Inplace.apply(*tensors, rules, backend or "")  # type: ignore[no-untyped-call]
        return taken[0]  # type: ignore[no-any-return]
    value: Tensor = _EagerLoss.apply(*tensors, rules, asked, backend or "")  # type: ignore[no-untyped-call]
    return value
