"""Supervised contrastive learning: all rows of an anchor's class are its positives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_fast.losses.contrastive import (
    ContrastiveModule,
    accept_features,
    check_options,
    check_same,
    scale_from,
)
from ssl_fast.losses.exchange import Local
from ssl_fast.losses.options import (
    Options,
    check_per_row,
    check_row_options,
    reduce_weighted,
)
from ssl_fast.losses.rows import key_norms
from ssl_fast.ops.pair_softmax import IGNORED_ID, accumulation_dtype
from ssl_fast.ops.pair_softmax_symmetric import pair_softmax_symmetric

__all__ = ["SupConLoss", "SupConStats", "sup_con"]


class SupConStats(NamedTuple):
    """By-products of a supervised contrastive loss, detached, on the features' device."""

    lse: Tensor  # [N]: log-sum-exp (nats) over the keys in an anchor's denominator
    positive_similarity: Tensor  # []: mean over anchors of the mean similarity to their positives


def _accept(
    embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any
) -> tuple[Tensor, Tensor, int, Tensor | None, Tensor | None]:
    """Rows [N * views, D] with their labels, the number of views, reference rows and labels."""
    views = 1
    if getattr(embeddings, "ndim", 2) == 3:
        embeddings = accept_features("embeddings", embeddings, "[N, views, D]")
        views = embeddings.shape[1]
        if views == 0:
            raise ValueError(
                f"embeddings must hold at least one view; got shape {tuple(embeddings.shape)}"
            )
        rows = embeddings.flatten(0, 1)
    else:
        rows = embeddings = accept_features("embeddings", embeddings, "[N, D]")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an int64 tensor [N]; got {type(labels).__name__}")
    check_per_row("labels", labels, embeddings.shape[0], rows.device, torch.int64)
    labels = labels if views == 1 else labels.repeat_interleave(views)
    if (ref_emb is None) != (ref_labels is None):
        missing = "ref_labels" if ref_labels is None else "ref_emb"
        raise ValueError(f"{missing} must be given: ref_emb and ref_labels go together; got None")
    if ref_emb is not None:
        ref_emb = accept_features("ref_emb", ref_emb, "[M, D]")
        check_same("ref_emb", ref_emb, "embeddings", rows, sizes={-1: "components"})
        check_per_row("ref_labels", ref_labels, ref_emb.shape[0], rows.device, torch.int64)
    return rows, labels, views, ref_emb, ref_labels


def _log_sum_exp(
    exchange: Local,
    rows: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    norms: tuple[Tensor, Tensor],  # [N], [M]
    ids: tuple[Tensor | None, Tensor | None],  # [N], [M]
    backend: str | None,
) -> Tensor:
    """Over the keys in each anchor's denominator; of the anchors themselves on half the tiles."""
    if keys is rows and exchange.world_size == 1:
        return pair_softmax_symmetric(rows, scale, norms[0], ids=ids[0], backend=backend)[0]
    return exchange.pair_softmax(
        rows, keys, scale * norms[0], norms[1],
        query_ids=ids[0], key_ids=ids[1], diagonals=(0,) if keys is rows else (), backend=backend,
    ).row_lse  # fmt: skip


def sup_con_over(
    exchange: Local,
    embeddings: Tensor,  # [N, D] or [N, views, D]
    labels: Tensor,  # [N]
    temperature: float | Tensor,
    *,
    ref_emb: Tensor | None,  # [M, D]
    ref_labels: Tensor | None,  # [M]
    normalize: bool,
    reduction: str,
    row_weight: Tensor | None,
    ignore: Tensor | None,
    label_smoothing: float,
    decoupled: bool,
    return_stats: bool,
    backend: str | None,
) -> Any:
    """``sup_con`` where the other rows may be those of many processes."""
    check_options(reduction, backend)
    rows, labels, views, ref_emb, ref_labels = _accept(embeddings, labels, ref_emb, ref_labels)
    scale = scale_from(temperature, rows)
    per_row = Options(
        row_weight=row_weight, ignore=ignore, label_smoothing=label_smoothing, decoupled=decoupled
    )
    check_row_options(per_row, embeddings)
    if views > 1:
        row_weight, ignore = (
            None if x is None else x.repeat_interleave(views) for x in (row_weight, ignore)
        )
    if ignore is not None:
        # Padding with NaN reaches neither a product nor a gradient.
        rows = rows.masked_fill(ignore[:, None], 0.0)
        labels = labels.masked_fill(ignore, IGNORED_ID)
    own = ref_emb is None
    keys, key_labels = (rows, labels) if ref_emb is None else (ref_emb, ref_labels)
    ones = scale.new_ones(())
    norm = key_norms(rows) if normalize else ones.expand(rows.shape[0])
    key_norm = norm if own else key_norms(keys) if normalize else ones.expand(keys.shape[0])
    ids = _ids(labels, key_labels, decoupled, ignore, own and exchange.world_size == 1)
    lse = _log_sum_exp(exchange, rows, keys, scale, (norm, key_norm), ids, backend)

    wide = accumulation_dtype(rows)
    unit = rows.to(wide) * norm[:, None]
    unit_keys = unit if own else keys.to(wide) * key_norm[:, None]
    sums, counts = exchange.class_sums(labels, unit_keys, key_labels)
    if own:
        sums, counts = sums - unit, counts - 1.0
    has_positive = counts > 0.0
    alike = (unit * sums).sum(dim=1) / torch.where(has_positive, counts, 1.0)
    positive = scale * alike
    kept = has_positive & (lse > -torch.inf)
    losses = torch.where(kept, torch.where(kept, lse, 0.0) - positive, 0.0)
    if label_smoothing:
        everything, number = _all_but_self(exchange, unit, unit_keys, key_labels, own)
        mean = scale * (unit * everything).sum(dim=1) / torch.where(number > 0.0, number, 1.0)
        losses = losses + torch.where(kept, label_smoothing * (positive - mean), 0.0)
    loss = reduce_weighted(exchange, losses, reduction, row_weight, ~has_positive)
    if reduction == "none":
        loss = loss.view(embeddings.shape[:-1])
    if not return_stats:
        return loss
    share = has_positive.to(wide)
    return loss, SupConStats(lse.detach(), (share * alike.detach()).sum() / share.sum())


def _ids(
    labels: Tensor,  # [N]
    key_labels: Tensor | None,  # [M]
    decoupled: bool,
    ignore: Tensor | None,  # [N]
    symmetric: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Which ids leave the denominator: those of a class when decoupled, and the ignored rows'."""
    if decoupled:
        return labels, key_labels
    if ignore is None or key_labels is None:
        return None, None
    if symmetric:
        # Each row has an id of its own.
        own = torch.arange(labels.shape[0], device=labels.device).masked_fill(ignore, IGNORED_ID)
        return own, own
    query_ids = torch.zeros_like(labels).masked_fill(ignore, IGNORED_ID)
    return query_ids, torch.ones_like(key_labels).masked_fill(key_labels == IGNORED_ID, IGNORED_ID)


def _all_but_self(
    exchange: Local,
    unit: Tensor,  # [N, D]
    unit_keys: Tensor,  # [M, D]
    key_labels: Tensor | None,  # [M]
    own: bool,
) -> tuple[Tensor, Tensor]:
    """The sum of all keys but the anchor itself [N, D], and how many they are [N]."""
    sums, number = exchange.class_sums(None, unit_keys, key_labels)
    if own:
        return sums - unit, (number - 1.0).expand(unit.shape[0])
    return sums.expand_as(unit), number.expand(unit.shape[0])


def sup_con(
    embeddings: Tensor,  # [N, D] or [N, views, D]
    labels: Tensor,  # [N]
    temperature: float | Tensor = 0.1,
    *,
    ref_emb: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    normalize: bool = True,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    ignore: Tensor | None = None,
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> Any:
    """``-((same * s.log_softmax(1)).sum(1) / same.sum(1)).mean()``, same: of one class, not itself.

    Here s is ``z @ z.T / temperature`` without its diagonal and z is ``F.normalize(embeddings)``.
    The loss (outside the logarithm) of Khosla et al., "Supervised Contrastive Learning"
    (arXiv:2004.11362). A mean over positives is a product with their sum, so that no N x N mask
    exists; the sweep visits the symmetric half of the tiles, and memory grows with N.

    Args:
        embeddings: [N, D], or [N, views, D] where all views of a row have its label.
        labels: int64 [N], any values.
        temperature: divides the similarities; a number, or a tensor of one element, which gets its
            gradient. A tensor's value is checked only on a CPU.
        ref_emb: [M, D] keys to compare the anchors with in place of each other.
        ref_labels: int64 [M], their labels.
        normalize: cosine similarities; False compares the embeddings as they are.
        reduction: "mean" over the anchors that have a positive (0, with gradients 0, where none
            has), "sum", or "none" (of every anchor, 0 for one without a positive, [N] or
            [N, views]).
        row_weight: [N], what an anchor's loss is multiplied by; a mean divides by their sum.
        ignore: bool [N]; these rows are neither anchors nor keys: the result is that of the batch
            without them, whatever they hold.
        label_smoothing: how much of an anchor's target goes to all its keys alike, in [0, 1).
        decoupled: positives leave the denominator.
        return_stats: give ``(loss, stats)``; stats holds ``lse`` [N] and ``positive_similarity``,
            detached.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Embeddings are float32, bfloat16, float16 or float64 (the reference's); under autocast they are
    cast once. Products accumulate in fp32. On a GPU the sums of a class are made with atomics,
    unless torch.use_deterministic_algorithms is on.

    Returns:
        The loss in nats, fp32 (float64 for float64 embeddings).

    Raises:
        TypeError: embeddings, labels or options of the wrong type or dtype.
        ValueError: shapes that don't fit, devices that differ, an option out of range.
        RuntimeError: ``backend`` can't serve this call.
    """
    return sup_con_over(
        Local(), embeddings, labels, temperature, ref_emb=ref_emb, ref_labels=ref_labels,
        normalize=normalize, reduction=reduction, row_weight=row_weight, ignore=ignore,
        label_smoothing=label_smoothing, decoupled=decoupled, return_stats=return_stats,
        backend=backend,
    )  # fmt: skip


class SupConLoss(ContrastiveModule):
    """``sup_con`` as a module: the same options, embeddings and labels given to ``forward``.

    Its values are pytorch-metric-learning's, but for anchors whose loss is exactly 0, which that
    leaves out of its mean.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        label_smoothing: float = 0.0,
        decoupled: bool = False,
        return_stats: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            return_stats=return_stats,
            backend=backend,
            label_smoothing=label_smoothing,
            decoupled=decoupled,
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        row_weight: Tensor | None = None,
        ignore: Tensor | None = None,
    ) -> Any:
        """The loss of ``embeddings`` [N, D] or [N, views, D]."""
        return sup_con(
            embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, row_weight=row_weight,
            ignore=ignore, **self.options(),
        )  # fmt: skip
