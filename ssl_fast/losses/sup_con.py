"""Supervised contrastive learning: all rows of an anchor's class are its positives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_fast.losses.anchors import Anchors, kept_sums, log_denominator
from ssl_fast.losses.contrastive import (
    ContrastiveModule,
    accept_features,
    check_options,
    check_same,
    scale_from,
)
from ssl_fast.losses.exchange import Local
from ssl_fast.losses.options import Options, check_per_row, options_of, reduce_weighted
from ssl_fast.losses.rows import key_norms
from ssl_fast.ops.pair_softmax import IGNORED_ID, accumulation_dtype

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


def _per_view(value: Tensor | None, views: int) -> Tensor | None:
    return value if value is None or views == 1 else value.repeat_interleave(views)


def _anchors(
    rows: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_emb: Tensor | None,  # [M, D]
    ref_labels: Tensor | None,  # [M]
    options: Options,  # of the rows
    normalize: bool,
    ones: Tensor,  # []
) -> Anchors:
    """The pairs, and ignored rows as zeros: padding with NaN reaches no product and no gradient."""
    ids, key_ids, ignore = options.query_ids, options.key_ids, options.ignore
    if ignore is not None:
        rows = rows.masked_fill(ignore[:, None], 0.0)
        labels = labels.masked_fill(ignore, IGNORED_ID)
        ids = None if ids is None else ids.masked_fill(ignore, IGNORED_ID)
    norm = key_norms(rows) if normalize else ones.expand(rows.shape[0])
    if ref_emb is None or ref_labels is None:
        both = None if ids is None else (ids, ids)
        return Anchors(rows, rows, (norm, norm), (labels, labels), both, ignore is not None)
    key_norm = key_norms(ref_emb) if normalize else ones.expand(ref_emb.shape[0])
    both = None if ids is None or key_ids is None else (ids, key_ids)
    ignoring = ignore is not None
    return Anchors(rows, ref_emb, (norm, key_norm), (labels, ref_labels), both, ignoring)


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
    return_stats: bool,
    backend: str | None,
    **given: Any,
) -> Any:
    """``sup_con`` where other rows may be those of many processes; ``given`` are the options."""
    check_options(reduction, backend)
    rows, labels, views, ref_emb, ref_labels = _accept(embeddings, labels, ref_emb, ref_labels)
    scale = scale_from(temperature, rows)
    own = ref_emb is None
    if own and given["key_ids"] is not None:
        raise ValueError("key_ids must be None without ref_emb: query_ids are the keys' as well")
    key_rows = embeddings.shape[0] if ref_emb is None else ref_emb.shape[0]
    options = options_of(embeddings, key_rows, in_batch=own, keys="ref_emb", **given)
    options = options._replace(
        query_ids=_per_view(options.query_ids, views),
        row_weight=_per_view(options.row_weight, views),
        ignore=_per_view(options.ignore, views),
    )
    ones = scale.new_ones(())
    anchors = _anchors(rows, labels, ref_emb, ref_labels, options, normalize, ones)

    wide = accumulation_dtype(rows)
    unit = anchors.rows.to(wide) * anchors.norms[0][:, None]
    unit_keys = unit if own else anchors.keys.to(wide) * anchors.norms[1][:, None]
    sums, counts = exchange.class_sums(anchors.labels[0], unit_keys, anchors.labels[1])
    if own:
        sums, counts = sums - unit, counts - 1.0
    has_positive = counts > 0.0
    lse = log_denominator(exchange, anchors, scale, counts, options, backend)
    alike = (unit * sums).sum(dim=1) / torch.where(has_positive, counts, 1.0)
    positive = scale * (alike - options.margin) if options.margin else scale * alike
    kept = has_positive & (lse > -torch.inf)
    losses = torch.where(kept, torch.where(kept, lse, 0.0) - positive, 0.0)
    if options.label_smoothing:
        everything, number = kept_sums(exchange, anchors, unit, unit_keys)
        mean = (unit * everything).sum(dim=1) - options.margin * counts
        mean = scale * mean / torch.where(number > 0.0, number, 1.0)
        smoothed = options.label_smoothing * (positive - mean)
        losses = losses + torch.where(kept, smoothed, 0.0)
    loss = reduce_weighted(exchange, losses, reduction, options.row_weight, ~has_positive)
    if reduction == "none":
        loss = loss.view(embeddings.shape[:-1])
    if not return_stats:
        return loss
    share = has_positive.to(wide)
    return loss, SupConStats(lse.detach(), (share * alike.detach()).sum() / share.sum())


def sup_con(
    embeddings: Tensor,  # [N, D] or [N, views, D]
    labels: Tensor,  # [N]
    temperature: float | Tensor = 0.1,
    *,
    ref_emb: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    normalize: bool = True,
    reduction: str = "mean",
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    decoupled: bool = False,
    hard_negative_beta: float = 0.0,
    return_stats: bool = False,
    backend: str | None = None,
) -> Any:
    """``-((same * s.log_softmax(1)).sum(1) / same.sum(1)).mean()``, same: of one class, not itself.

    Here s is ``z @ z.T / temperature`` without its diagonal and z is ``F.normalize(embeddings)``.
    The loss (outside the logarithm) of Khosla et al., "Supervised Contrastive Learning"
    (arXiv:2004.11362). A mean over positives is a product with their sum, so that no N x N mask
    exists; the sweep visits the symmetric half of the tiles, and memory grows with N. Ids, a margin
    or hard negatives take a sweep over the positives and one over the negatives (two when hard).

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
        query_ids: int64 [N]; an embedding of another class that has an anchor's id leaves its
            denominator: a false negative.
        key_ids: int64 [M], the ids of ``ref_emb``, given with ``query_ids``.
        row_weight: [N], what an anchor's loss is multiplied by; a mean divides by their sum.
        ignore: bool [N]; these rows are neither anchors nor keys: the result is that of the batch
            without them, whatever they hold.
        label_smoothing: how much of an anchor's target goes to all its keys alike, in [0, 1).
        margin: subtracted from the positives' similarities.
        decoupled: positives leave the denominator.
        hard_negative_beta: how much harder negatives weigh more, beta of Robinson et al.
            (arXiv:2010.04592) with tau_plus = 0; 0 is none.
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
        normalize=normalize, reduction=reduction, query_ids=query_ids, key_ids=key_ids,
        row_weight=row_weight, ignore=ignore, label_smoothing=label_smoothing, margin=margin,
        decoupled=decoupled, hard_negative_beta=hard_negative_beta, return_stats=return_stats,
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
        margin: float = 0.0,
        decoupled: bool = False,
        hard_negative_beta: float = 0.0,
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
            margin=margin,
            decoupled=decoupled,
            hard_negative_beta=hard_negative_beta,
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        **per_row: Any,
    ) -> Any:
        """The loss of ``embeddings`` [N, D] or [N, views, D].

        ``per_row`` are ``query_ids``, ``key_ids``, ``row_weight`` and ``ignore``.
        """
        return sup_con(
            embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, **self.options(), **per_row
        )
