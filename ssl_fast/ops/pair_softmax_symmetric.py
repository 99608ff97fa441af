"""pair_softmax of a symmetric matrix: every row is a query and a key, half of the tiles are enough.

s_ij = scale row_scale_i row_scale_j <x_i, x_j>. A pair leaves the softmax where i == j, where
|i - j| == pairs (with pairs > 0), where the ids are equal (with ``matching``: where they differ) or
either is ``IGNORED_ID``; rows with two ids, [N, 2], are equal in either. The gradient is a second
half sweep; gradients of gradients are those of the reference formula.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.autograd import Function

from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.ops.gradients import differentiated_again, open_signature, vector_jacobian
from ssl_fast.ops.registration import empty_rows, implementation, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pair_softmax_symmetric"]


def _fake_symmetric(features: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(features), empty_rows(features)


def _fake_backward(features: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), empty_rows(features)


_SCALED = "Tensor features, Tensor scale, Tensor row_scale, Tensor? ids, SymInt pairs"
_pair_softmax_symmetric = register(
    f'pair_softmax_symmetric({_SCALED}, *, bool matching=False, str backend="") -> '
    "(Tensor, Tensor)",
    implementation("pair_softmax_symmetric", 0),
    _fake_symmetric,
)
_pair_softmax_symmetric_backward = register(
    f"pair_softmax_symmetric_backward({_SCALED}, Tensor lse, Tensor row_grad, *, "
    'bool matching=False, str backend="") -> (Tensor, Tensor)',
    implementation("pair_softmax_symmetric_backward", 0),
    _fake_backward,
)


class _Symmetric(Function):
    """pair_softmax_symmetric with its gradient. Inputs: those of the operator, and the backend."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, matching, backend = inputs
        return _pair_softmax_symmetric(*arguments, matching=matching, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.pairs, ctx.matching, ctx.backend = inputs
        lse, maximum = output
        ctx.mark_non_differentiable(maximum)
        ctx.save_for_backward(*tensors, lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return (None,) * 7
        features, scale, row_scale, ids, lse = ctx.saved_tensors
        arguments = (features, scale, row_scale, ids, ctx.pairs, lse, grads[0].contiguous())
        if differentiated_again():
            made: Any = _SymmetricGradient.apply(  # type: ignore[no-untyped-call]
                *arguments, ctx.matching, ctx.backend
            )
        else:
            made = _pair_softmax_symmetric_backward(
                *arguments, matching=ctx.matching, backend=ctx.backend
            )
        grad_features, moment = made
        found = (grad_features, 0.5 * (row_scale * moment).sum(), scale * moment)
        needed = zip(found, ctx.needs_input_grad[:3], strict=True)
        return *(x if need else None for x, need in needed), None, None, None, None


class _SymmetricGradient(Function):
    """pair_softmax_symmetric_backward; its own gradient is the reference formula's."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        *arguments, matching, backend = inputs
        return _pair_softmax_symmetric_backward(*arguments, matching=matching, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        *tensors, ctx.pairs = inputs[:5]
        ctx.save_for_backward(*tensors, *inputs[5:7])
        ctx.matching = inputs[7]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        features, scale, row_scale, ids, lse, row_grad = ctx.saved_tensors

        def formula(*values: Any) -> Any:
            backward: Any = reference.pair_softmax_symmetric_backward
            return backward(*values[:3], ids, ctx.pairs, *values[3:], matching=ctx.matching)

        needed = ctx.needs_input_grad
        found = vector_jacobian(
            formula, (features, scale, row_scale, lse, row_grad), (*needed[:3], *needed[5:7]), grads
        )
        return *found[:3], None, None, *found[3:], None, None


def pair_softmax_symmetric(
    features: Tensor,  # [N, D]
    scale: Tensor,  # []
    row_scale: Tensor,  # [N]
    *,
    ids: Tensor | None = None,  # [N] or [N, 2]
    pairs: int = 0,
    matching: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.logsumexp(s, dim=1)`` of the pairs kept [N], and the rows' maxima [N].

    ``pairs`` is 0, or N / 2 where rows that far apart are each other's positive and leave.
    Differentiable in features and both scales, to any order; the maxima carry no gradient.
    """
    if pairs and 2 * pairs != features.shape[0]:
        raise ValueError(f"pairs must be 0 or half of the {features.shape[0]} rows; got {pairs}")
    arguments = (features, scale, row_scale.contiguous(), ids, pairs, matching, backend or "")
    lse, maximum = _Symmetric.apply(*arguments)  # type: ignore[no-untyped-call]
    return lse, maximum
