"""The loss of each row, and of each key where both directions count, composed around one sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ssl_fast.losses.options import Options, kept_keys, mean_logits, row_losses, without_ignored
from ssl_fast.ops.gradients import wants
from ssl_fast.ops.pair_softmax import PairSoftmax, accumulation_dtype, inverse_norms
from ssl_fast.ops.pair_softmax_loss import ContrastiveLoss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ssl_fast.losses.exchange import Local

__all__ = [
    "Pairs",
    "contrastive_pairs",
    "contrastive_rows",
    "finish_rows",
    "hardened",
    "key_norms",
    "row_dots",
]


def key_norms(features: Tensor) -> Tensor:
    """1 / norm of each row; without a copy of the features where they need no gradient."""
    if wants(features) or torch.compiler.is_compiling():
        return inverse_norms(features)
    norms = torch.linalg.vector_norm(features, dim=1, dtype=accumulation_dtype(features))
    return torch.where(norms <= 1e-12, 0.0, norms.reciprocal())


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """<left_i, right_i> in the accumulation dtype, [N]."""
    wide = accumulation_dtype(left)
    return (left.to(wide) * right.to(wide)).sum(dim=1)


class Pairs(NamedTuple):
    """Two sets of rows and which pairs of them are neither positive nor excluded."""

    query: Tensor  # [N, D]
    key: Tensor  # [M, D]
    query_scale: Tensor  # [N], without the loss's scale
    key_scale: Tensor  # [M]
    query_ids: Tensor | None  # [N]
    key_ids: Tensor | None  # [M]
    diagonals: tuple[int, ...]

    def swapped(self) -> Pairs:
        """The keys as queries."""
        return Pairs(
            self.key, self.query, self.key_scale, self.query_scale, self.key_ids, self.query_ids,
            tuple(-d for d in self.diagonals),
        )  # fmt: skip


def _swept(
    exchange: Local, pairs: Pairs, scale: Tensor, columns: bool, backend: str | None
) -> PairSoftmax:
    return exchange.pair_softmax(
        pairs.query, pairs.key, scale * pairs.query_scale, pairs.key_scale,
        query_ids=pairs.query_ids, key_ids=pairs.key_ids, diagonals=pairs.diagonals,
        columns=columns, backend=backend,
    )  # fmt: skip


def hardened(lse: Tensor, lse_of_weights: Tensor, counts: Tensor) -> Tensor:
    """log(count) + lse((1 + beta) s) - lse(beta s), -inf where nothing is left."""
    some = counts > 0.0
    value = torch.where(some, counts, 1.0).log()
    value = value + torch.where(some, lse, 0.0) - torch.where(some, lse_of_weights, 0.0)
    return torch.where(some, value, -torch.inf)


def finish_rows(
    exchange: Local,
    pairs: Pairs,
    scale: Tensor,  # []
    options: Options,
    lse: Tensor,  # [N]
    lse_of_weights: Tensor | None,  # [N], with hard negatives
    positive_logit: Tensor,  # [N]
) -> tuple[Tensor, Tensor]:
    """From log-sum-exps to the rows' losses; the lse that counts is the second result."""
    counts = mean = None
    if options.label_smoothing or lse_of_weights is not None:
        wide = accumulation_dtype(pairs.key)
        # Without smoothing the keys are counted, and not summed.
        keys = pairs.key if options.label_smoothing else pairs.key[:, :0]
        keys = keys.to(wide) * pairs.key_scale[:, None]
        rules = pairs.query_ids, pairs.key_ids, pairs.diagonals
        sums, counts = kept_keys(exchange, keys, *rules, pairs.query.shape[0])
        if options.label_smoothing:
            factors = scale * pairs.query_scale
            mean = mean_logits(pairs.query, factors, sums, counts, positive_logit)
    if lse_of_weights is not None and counts is not None:
        lse = hardened(lse, lse_of_weights, counts)
    return row_losses(lse, positive_logit, scale, options, mean, counts), lse


def contrastive_pairs(
    exchange: Local,
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,  # []
    positive: Tensor | None,  # [N, D]; None: the positive is on the first diagonal
    *,
    options: Options,
    diagonals: Sequence[int],
    normalize: bool,
    columns: bool,
    backend: str | None,
) -> tuple[ContrastiveLoss, Tensor]:
    """The loss of each row [N] and, with ``columns``, of each key [M] (else [0])."""
    in_batch = positive is None
    query_ids, key_ids, features = without_ignored(
        options, *((query, key) if in_batch else (query,)),
        key_rows=key.shape[0], in_batch=in_batch,
    )  # fmt: skip
    query, key = (*features, key)[:2]
    ones = scale.new_ones(())
    query_norm = key_norms(query) if normalize else ones.expand(query.shape[0])
    key_norm = key_norms(key) if normalize else ones.expand(key.shape[0])
    pairs = Pairs(query, key, query_norm, key_norm, query_ids, key_ids, tuple(diagonals))
    beta = options.hard_negative_beta
    sweep = _swept(exchange, pairs, scale * (1.0 + beta) if beta else scale, columns, backend)
    weights = _swept(exchange, pairs, scale * beta, columns, backend) if beta else None
    if positive is None:
        positive_logit = sweep.diagonal_logit / (1.0 + beta) if beta else sweep.diagonal_logit
    else:
        if options.ignore is not None:
            positive = positive.masked_fill(options.ignore[:, None], 0.0)
        positive_logit = scale * row_dots(query, positive) * query_norm
        if normalize:
            positive_logit = positive_logit * key_norms(positive)
    losses, lse = finish_rows(
        exchange, pairs, scale, options, sweep.row_lse,
        None if weights is None else weights.row_lse, positive_logit,
    )  # fmt: skip
    column_losses = losses[:0]
    if columns:
        column_losses, _ = finish_rows(
            exchange, pairs.swapped(), scale, options, sweep.column_lse,
            None if weights is None else weights.column_lse, positive_logit,
        )  # fmt: skip
    row_max = sweep.row_max / (1.0 + beta) if beta else sweep.row_max
    return ContrastiveLoss(losses, lse, positive_logit, row_max), column_losses


def contrastive_rows(
    exchange: Local,
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,  # []
    positive: Tensor | None,  # [N, D]
    *,
    options: Options,
    diagonals: Sequence[int],
    normalize: bool,
    backend: str | None,
) -> ContrastiveLoss:
    """The loss of each row: what the fused losses reduce, composed so that rows may weigh any."""
    return contrastive_pairs(
        exchange, query, key, scale, positive,
        options=options, diagonals=diagonals, normalize=normalize, columns=False, backend=backend,
    )[0]  # fmt: skip
