"""The contrastive losses on pair_softmax that make their gradient in the forward pass.

``softplus(log-sum-exp of the keys kept - positive logit)`` per row, reduced to a mean or a sum:
then every row weighs the same, and the gradient made in the forward pass needs only one factor in
the backward. Where rows weigh differently, ``contrastive_rows`` composes the same numbers from
``pair_softmax``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.ops.gradients import apart, wants
from ssl_fast.ops.made_gradient import reduced_loss
from ssl_fast.ops.pair_softmax import RULES
from ssl_fast.ops.registration import empty_like, empty_rows, implementation, register

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ContrastiveLoss", "pair_softmax_loss", "pair_softmax_symmetric_loss"]


class ContrastiveLoss(NamedTuple):
    """A reduced loss and, without gradient, what it was made of. The lse is over negatives."""

    loss: Tensor  # []
    row_lse: Tensor  # [N]
    positive_logit: Tensor  # [N]
    row_max: Tensor  # [N]


def _fake_loss(query: Tensor, positive: Tensor | None, key: Tensor, *rest: Any, **_: Any) -> Any:
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
    """Inputs: query, positive, key, scale; then query_ids, key_ids."""

    diagonals: tuple[int, ...]
    normalize: bool
    needs: tuple[bool, bool, bool]  # query, positive, key
    mean: bool
    backend: str
    rows: int = 4
    inputs: int = 4

    def operator(self, *tensors: Any) -> Any:
        rules = (self.diagonals, self.normalize)
        return _pair_softmax_loss(*tensors, *rules, *self.needs, backend=self.backend)

    def formula(self, *tensors: Any) -> Any:
        loss: Any = reference.pair_softmax_loss
        return loss(*tensors, self.diagonals, self.normalize, *self.needs)

    def per_input(self, made: Sequence[Tensor]) -> Sequence[Tensor]:
        return made


class _SymmetricPlan(NamedTuple):
    """Inputs: the two halves of the features, scale."""

    normalize: bool
    need_features: bool
    mean: bool
    backend: str
    rows: int = 4
    inputs: int = 3

    def operator(self, first: Tensor, second: Tensor, scale: Tensor) -> Any:
        return _pair_softmax_symmetric_loss(
            torch.cat([first, second]), scale, self.normalize, self.need_features,
            backend=self.backend,
        )  # fmt: skip

    def formula(self, first: Tensor, second: Tensor, scale: Tensor) -> Any:
        features = torch.cat([first, second])
        return reference.pair_softmax_symmetric_loss(features, scale, self.normalize, True)

    def per_input(self, made: Sequence[Tensor]) -> Sequence[Tensor]:
        features, scale = made
        half = features.shape[0] // 2
        return features[:half], features[half:], scale


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
    sweep. Keys that need no gradient, a queue's, may be overwritten before the backward.
    """
    needs = (wants(query), wants(positive), wants(key))
    if wants(scale) and not any(needs):
        needs = (True, False, False)  # the scale's gradient comes with another, or not at all
    plan = _Plan(tuple(diagonals), normalize, needs, mean, backend or "")
    if positive is not None:
        positive = apart(positive, query)
    key = apart(key, query, positive)
    tensors = (query, positive, key, scale, query_ids, key_ids)
    return ContrastiveLoss(*reduced_loss(plan, *tensors))


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
    need_features = wants(first) or wants(second) or wants(scale)
    plan = _SymmetricPlan(normalize, need_features, mean, backend or "")
    return ContrastiveLoss(*reduced_loss(plan, first, apart(second, first), scale))
