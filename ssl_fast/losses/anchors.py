"""What a loss whose positives are the rows of a class needs of its pairs, by rules of O(N) size."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ssl_fast.losses.rows import hardened
from ssl_fast.ops.pair_softmax import IGNORED_ID
from ssl_fast.ops.pair_softmax_symmetric import pair_softmax_symmetric

if TYPE_CHECKING:
    from ssl_fast.losses.exchange import Local
    from ssl_fast.losses.options import Options

__all__ = ["Anchors", "kept_sums", "log_denominator"]


class Anchors(NamedTuple):
    """Rows, the keys that they are compared with, and what says which pairs count."""

    rows: Tensor  # [N, D]
    keys: Tensor  # [M, D]; `rows` where the anchors are each other's keys
    norms: tuple[Tensor, Tensor]  # [N], [M]: inverse norms, or ones
    labels: tuple[Tensor, Tensor]  # [N], [M]; IGNORED_ID for an ignored row
    ids: tuple[Tensor, Tensor] | None  # [N], [M]; IGNORED_ID for an ignored row
    ignoring: bool

    @property
    def own(self) -> bool:
        """Whether the anchors are each other's keys."""
        return self.keys is self.rows


def _mixed(label: Tensor, number: Tensor) -> Tensor:
    """One number for two: equal pairs agree, others by chance (odds of 2^-33 among 2^31 pairs)."""
    number = (number ^ number >> 29) * -4658895280553007687
    found = (label * -7046029254386353131) ^ number ^ number >> 32
    return found.masked_fill(label == IGNORED_ID, IGNORED_ID)


def kept_sums(
    exchange: Local,
    anchors: Anchors,
    unit: Tensor,  # [N, D]; D may be 0
    unit_keys: Tensor,  # [M, D]
) -> tuple[Tensor, Tensor]:
    """The sum of the keys that stay with an anchor, its class among them, and how many they are."""
    rows = unit.shape[0]
    sums, counts = exchange.class_sums(None, unit_keys, anchors.labels[1])
    sums, counts = sums.expand_as(unit), counts.expand(rows)
    if anchors.own:
        sums, counts = sums - unit, counts - 1.0
    if anchors.ids is not None:
        shared, number = exchange.class_sums(anchors.ids[0], unit_keys, anchors.ids[1])
        both, key_both = (_mixed(*x) for x in zip(anchors.labels, anchors.ids, strict=True))
        alike, of_them = exchange.class_sums(both, unit_keys, key_both)
        sums, counts = sums - (shared - alike), counts - (number - of_them)
    return sums, counts


def _log_sum_exp(
    exchange: Local,
    anchors: Anchors,
    scale: Tensor,  # []
    ids: tuple[Tensor | None, Tensor | None],  # [N] or [N, 2], [M] or [M, 2]
    backend: str | None,
    *,
    matching: bool = False,
) -> Tensor:
    """Over the keys that ids leave to each anchor; of the anchors themselves on half the tiles."""
    rows, keys, (norm, key_norm) = anchors.rows, anchors.keys, anchors.norms
    if anchors.own and exchange.world_size == 1:
        return pair_softmax_symmetric(
            rows, scale, norm, ids=ids[0], matching=matching, backend=backend
        )[0]
    return exchange.pair_softmax(
        rows, keys, scale * norm, key_norm, query_ids=ids[0], key_ids=ids[1],
        diagonals=(0,) if anchors.own else (), matching=matching, backend=backend,
    ).row_lse  # fmt: skip


def _ids_of_ignored(exchange: Local, anchors: Anchors) -> tuple[Tensor | None, Tensor | None]:
    """Ids by which only ignored rows leave."""
    if not anchors.ignoring:
        return None, None
    labels, key_labels = anchors.labels
    if anchors.own and exchange.world_size == 1:
        # Each row has an id of its own.
        rows = torch.arange(labels.shape[0], device=labels.device)
        rows = rows.masked_fill(labels == IGNORED_ID, IGNORED_ID)
        return rows, rows
    query_ids = torch.zeros_like(labels).masked_fill(labels == IGNORED_ID, IGNORED_ID)
    return query_ids, torch.ones_like(key_labels).masked_fill(key_labels == IGNORED_ID, IGNORED_ID)


def log_denominator(
    exchange: Local,
    anchors: Anchors,
    scale: Tensor,  # []
    positives: Tensor,  # [N]: how many an anchor has
    options: Options,
    backend: str | None,
) -> Tensor:
    """Log-sum-exp [N] over an anchor's negatives, weighed, and its positives less their margin.

    One sweep where neither is touched; else one over the negatives, one more for their weights, and
    one over the positives: the difference of two log-sum-exps would cancel.
    """
    margin, beta = options.margin, options.hard_negative_beta
    decoupled = options.decoupled
    if not (margin or beta or decoupled) and anchors.ids is None:
        return _log_sum_exp(exchange, anchors, scale, _ids_of_ignored(exchange, anchors), backend)
    unlike: tuple[Tensor, Tensor] = anchors.labels
    if anchors.ids is not None:
        query_ids, key_ids = (torch.stack(x, 1) for x in zip(unlike, anchors.ids, strict=True))
        unlike = query_ids, key_ids
    harder = scale * (1.0 + beta) if beta else scale
    lse = _log_sum_exp(exchange, anchors, harder, unlike, backend)
    if beta:
        weights = _log_sum_exp(exchange, anchors, scale * beta, unlike, backend)
        nothing, nothing_keys = (norm.new_empty(norm.shape[0], 0) for norm in anchors.norms)
        _, counts = kept_sums(exchange, anchors, nothing, nothing_keys)
        counts = (counts - positives).masked_fill(anchors.labels[0] == IGNORED_ID, 0.0)
        lse = hardened(lse, weights, counts)
    if decoupled:
        return lse
    same = _log_sum_exp(exchange, anchors, scale, anchors.labels, backend, matching=True)
    # An anchor without a positive has no loss; -inf twice would make its gradient NaN.
    same = torch.where(positives > 0.0, same - scale * margin, 0.0)
    return torch.logaddexp(lse, same)
