"""The contrastive losses on pair_softmax that make their gradient in the forward pass.

``softplus(log-sum-exp of the keys kept - positive logit)`` per row, reduced to a mean or a sum:
then every row weighs the same, and the gradient made in the forward pass needs only one factor in
the backward. Where rows weigh differently, ``contrastive_rows`` composes the same numbers from
``pair_softmax``. Gradients of gradients are those of the reference formula, which stores the pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.ops.pair_softmax import (
    RULES,
    apart,
    differentiated_again,
    empty_like,
    empty_rows,
    implementation,
    open_signature,
    vector_jacobian,
)
from ssl_fast.ops.registration import first_derivative_only, register

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ContrastiveLoss", "pair_softmax_loss", "pair_softmax_symmetric_loss"]


class ContrastiveLoss(NamedTuple):
    """A reduced loss and, without gradient, what it was made of. The lse is over negatives."""

    loss: Tensor  # []
    row_lse: Tensor  # [N]
    positive_logit: Tensor  # [N]
    row_max: Tensor  # [N]


def _fake_loss(query: Tensor, positive: Tensor | None, key: Tensor, *rest: Any, **_: str) -> Any:
    needs = rest[-3:]
    grads = (
        empty_like(x, need, query) for x, need in zip((query, positive, key), needs, strict=True)
    )
    rows = (empty_rows(query) for _ in range(4))
    return *rows, *grads, empty_rows(query, None if any(needs) else 0)


def _fake_symmetric_loss(
    features: Tensor, _scale: Tensor, _normalize: bool, need_features: bool, **_: str
) -> Any:
    rows = (empty_rows(features) for _ in range(4))
    grad = empty_like(features, need_features, features)
    return *rows, grad, empty_rows(features, None if need_features else 0)


_pair_softmax_loss = register(
    f"pair_softmax_loss(Tensor query, Tensor? positive, Tensor key, Tensor scale, {RULES}, "
    "bool normalize, bool need_query, bool need_positive, bool need_key, *, "
    'str backend="") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    implementation("pair_softmax_loss", 2),
    _fake_loss,
)
_pair_softmax_symmetric_loss = register(
    "pair_softmax_symmetric_loss(Tensor features, Tensor scale, bool normalize, "
    'bool need_features, *, str backend="") '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation("pair_softmax_symmetric_loss", 0),
    _fake_symmetric_loss,
)


class _Plan(NamedTuple):
    """What a fused loss is told beside its tensors."""

    symmetric: bool
    diagonals: tuple[int, ...]
    normalize: bool
    needs: tuple[bool, bool, bool]  # query, positive, key
    mean: bool
    backend: str


def _per_input(plan: _Plan, query: Tensor, made: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients that the operator made, one for each input; the scale's is last."""
    if not plan.symmetric:
        return made
    features, scale = made
    return features[: query.shape[0]], features[query.shape[0] :], scale


def _weigh(weight: Tensor, made: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients that a fused loss made for its features and for scale, times ``weight`` []."""
    *grads, grad_scale = made
    return *(_weigh_one(weight, grad) for grad in grads), grad_scale.sum() * weight


def _weigh_one(weight: Tensor, grad: Tensor) -> Tensor:
    if weight.dtype is grad.dtype:
        return grad * weight
    # In fp32, which a scalar tensor wouldn't enforce: weight may be below fp16's smallest.
    return (grad * weight.view(1)).to(grad.dtype)


class _FusedLoss(Function):
    """The loss and its gradient from one operator; the backward only weights what was made.

    Inputs: the plan, query, positive, key, scale, query_ids, key_ids. In a symmetric loss, query
    and positive are the two halves of the features and there is no key.
    """

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        plan, query, positive, key, scale, query_ids, key_ids = inputs
        if plan.symmetric:
            results = _pair_softmax_symmetric_loss(
                torch.cat([query, positive]), scale, plan.normalize, any(plan.needs),
                backend=plan.backend,
            )  # fmt: skip
        else:
            results = _pair_softmax_loss(
                query, positive, key, scale, query_ids, key_ids, plan.diagonals, plan.normalize,
                *plan.needs, backend=plan.backend,
            )  # fmt: skip
        loss = results[0]
        return loss.mean() if plan.mean else loss.sum(), *results[1:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[4:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight = grads[0]
        if weight is None:
            return (None,) * 7
        *inputs, query_ids, key_ids = ctx.saved_tensors[:6]
        made = _per_input(ctx.plan, inputs[0], ctx.saved_tensors[6:])
        needed = ctx.needs_input_grad[1:5]
        if ctx.plan.mean:
            # An empty batch has a mean of NaN and a gradient of 0, as in torch.
            weight = weight / max(made[-1].shape[0], 1)
        if differentiated_again():
            arguments = (ctx.plan, weight, *inputs, query_ids, key_ids, *made)
            *found, grad_scale = _WeightedGradient.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            if torch.compiler.is_compiling():
                present = [x for x in inputs if x is not None]
                weight = first_derivative_only(weight, present)
            found = [
                _weigh_one(weight, grad) if need else None
                for grad, need in zip(made[:-1], needed, strict=False)
            ]
            grad_scale = made[-1].sum() * weight if needed[-1] else None
        if ctx.plan.symmetric:
            found.append(None)
        found.append(grad_scale)
        wanted = (grad if need else None for grad, need in zip(found, needed, strict=True))
        return None, *wanted, None, None


class _EagerLoss(Function):
    """``_FusedLoss`` where neither a transform nor torch.compile looks on.

    Without ``setup_context``, ``apply`` binds no default arguments, and what the backward needs is
    saved without passing through autograd as an output: 20 of 92 µs in a call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        results = _FusedLoss.forward(*inputs)
        ctx.plan, *tensors = inputs
        ctx.mark_non_differentiable(*results[1:4])
        ctx.save_for_backward(*tensors, *results[4:])
        ctx.set_materialize_grads(False)
        return results[:4]

    backward = _FusedLoss.backward


def _fused_loss(*inputs: Any) -> ContrastiveLoss:
    function = _FusedLoss if _watched() else _EagerLoss
    results: Any = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return ContrastiveLoss(*results[:4])


class _WeightedGradient(Function):
    """The gradients a fused loss made, weighted; their own gradient is the reference formula's."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        return _weigh(inputs[1], inputs[8:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        ctx.plan = inputs[0]
        ctx.save_for_backward(*inputs[1:8])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan = ctx.plan
        *inputs, query_ids, key_ids = ctx.saved_tensors

        def formula(weight: Tensor, *values: Any) -> tuple[Tensor, ...]:
            results: Any
            if plan.symmetric:
                results = reference.pair_softmax_symmetric_loss(
                    torch.cat(values[:2]), values[3], plan.normalize, True
                )
            else:
                loss: Any = reference.pair_softmax_loss
                rules = (query_ids, key_ids, plan.diagonals)
                results = loss(*values, *rules, plan.normalize, *plan.needs)
            return _weigh(weight, _per_input(plan, values[0], results[4:]))

        found = vector_jacobian(formula, inputs, ctx.needs_input_grad[1:6], grads)
        return None, *found, *(None,) * (len(ctx.needs_input_grad) - 6)


def _watched() -> bool:
    """Whether a transform of torch.func or torch.compile looks on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _wants(tensor: Tensor | None) -> bool:
    """Whether a gradient is asked for; a transform's inner tensor doesn't tell of outer ones."""
    if tensor is None or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return tensor.requires_grad
    return tensor.requires_grad or torch._C._are_functorch_transforms_active()


def pair_softmax_loss(
    query: Tensor,  # [N, D]
    positive: Tensor | None,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,  # []
    *,
    query_ids: Tensor | None = None,  # [N]
    key_ids: Tensor | None = None,  # [M]
    diagonals: Sequence[int] = (),
    normalize: bool,
    mean: bool,
    backend: str | None = None,
) -> ContrastiveLoss:
    """Mean or sum over rows of ``softplus(logsumexp of the keys kept - positive logit)``.

    A ``positive`` of None means that key i is row i's; ``diagonals=(0,)`` then keeps it out of the
    sweep.
    """
    needs = (_wants(query), _wants(positive), _wants(key))
    if _wants(scale) and not any(needs):
        needs = (True, False, False)  # the scale's gradient comes with another, or not at all
    plan = _Plan(False, tuple(diagonals), normalize, needs, mean, backend or "")
    if positive is not None:
        positive = apart(positive, query)
    key = apart(key, query, positive)
    return _fused_loss(plan, query, positive, key, scale, query_ids, key_ids)


def pair_softmax_symmetric_loss(
    first: Tensor,  # [N, D]
    second: Tensor,  # [N, D]
    scale: Tensor,  # []
    *,
    normalize: bool,
    mean: bool,
    backend: str | None = None,
) -> ContrastiveLoss:
    """The same loss of all 2N rows, where first[i] and second[i] are each other's positive.

    The keys of a row are all others; the by-products are [2N].
    """
    needs = (_wants(first) or _wants(scale), _wants(second), False)
    plan = _Plan(True, (), normalize, needs, mean, backend or "")
    return _fused_loss(plan, first, apart(second, first), None, scale, None, None)
