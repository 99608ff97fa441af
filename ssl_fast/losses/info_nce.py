"""InfoNCE: tell a query's positive key from negatives."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ssl_fast.losses.contrastive import (
    ContrastiveModule,
    ContrastiveStats,
    accept_features,
    check_choice,
    check_options,
    check_same,
    scale_from,
    with_stats,
)
from ssl_fast.losses.exchange import Local
from ssl_fast.losses.options import Options, options_of, reduce_weighted, row_losses
from ssl_fast.losses.rows import contrastive_rows, hardened
from ssl_fast.ops.pair_softmax import accumulation_dtype, inverse_norms
from ssl_fast.ops.pair_softmax_loss import ContrastiveLoss, pair_softmax_loss
from ssl_fast.ops.registration import without_autocast

__all__ = ["InfoNCE", "info_nce"]

NEGATIVE_MODES = ("unpaired", "paired")


def _accept(
    query: Any, positive_key: Any, negative_keys: Any, negative_mode: Any, alone: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The features after all checks of types, shapes and devices, cast where autocast is on."""
    check_choice("negative_mode", negative_mode, NEGATIVE_MODES)
    query = accept_features("query", query, "[N, D]")
    positive_key = accept_features("positive_key", positive_key, "[N, D]")
    check_same("positive_key", positive_key, "query", query, sizes={0: "rows", -1: "components"})
    if negative_keys is None:
        return query, positive_key, None
    paired = negative_mode == "paired"
    negative_keys = accept_features(
        "negative_keys", negative_keys, "[N, M, D]" if paired else "[M, D]"
    )
    sizes = {0: "rows", -1: "components"} if paired else {-1: "components"}
    check_same("negative_keys", negative_keys, "query", query, sizes=sizes)
    # Among processes, others may have what this one lacks.
    if negative_keys.shape[-2] == 0 and (alone or paired):
        raise ValueError(
            f"negative_keys must hold at least one key; got shape {tuple(negative_keys.shape)}"
        )
    return query, positive_key, negative_keys


def _paired_rows(
    query: Tensor,  # [N, D]
    positive: Tensor,  # [N, D]
    negatives: Tensor,  # [N, M, D]
    scale: Tensor,  # []
    normalize: bool,
    options: Options,
) -> ContrastiveLoss:
    """The loss of each row where every query has negatives of its own: a batched product."""
    wide = accumulation_dtype(query)
    rows, positive, keys = query.to(wide), positive.to(wide), negatives.to(wide)
    if options.ignore is not None:
        rows, positive = (x.masked_fill(options.ignore[:, None], 0.0) for x in (rows, positive))
        keys = keys.masked_fill(options.ignore[:, None, None], 0.0)
    if normalize:
        rows = rows * inverse_norms(rows)[:, None]
        positive = positive * inverse_norms(positive)[:, None]
    with without_autocast(query.device.type):  # which would lower the product
        logits = torch.bmm(keys, rows[:, :, None])[:, :, 0] * scale  # [N, M]
    if normalize:
        logits = logits * inverse_norms(keys.flatten(0, 1)).view_as(logits)
    positive_logit = scale * (rows * positive).sum(dim=1)
    row_max = logits.detach().amax(dim=1)
    beta = options.hard_negative_beta
    counts = logits.new_full((logits.shape[0],), logits.shape[1])
    row_lse = ((1.0 + beta) * logits).logsumexp(dim=1)
    if beta:
        row_lse = hardened(row_lse, (beta * logits).logsumexp(dim=1), counts)
    mean = (logits.sum(dim=1) + positive_logit) / (counts + 1.0)
    smoothed = mean if options.label_smoothing else None
    losses = row_losses(row_lse, positive_logit, scale, options, smoothed, counts)
    return ContrastiveLoss(losses, row_lse, positive_logit, row_max)


def info_nce_over(
    exchange: Local,
    query: Tensor,  # [N, D]
    positive_key: Tensor,  # [N, D]
    negative_keys: Tensor | None,  # [M, D] or [N, M, D]
    temperature: float | Tensor,
    reduction: str,
    negative_mode: str,
    *,
    normalize: bool,
    return_stats: bool,
    backend: str | None,
    **given: Any,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """``info_nce`` where the keys may be those of many processes; ``given`` are the options."""
    check_options(reduction, backend)
    query, positive_key, negative_keys = _accept(
        query, positive_key, negative_keys, negative_mode, exchange.world_size == 1
    )
    scale = scale_from(temperature, query)
    in_batch = negative_keys is None
    keys = positive_key if negative_keys is None else negative_keys
    if negative_keys is not None and negative_mode == "paired":
        if given["query_ids"] is not None or given["key_ids"] is not None:
            raise ValueError(
                "query_ids and key_ids must be None with negative_mode='paired', where every query "
                "has negatives of its own"
            )
        options = options_of(query, 0, in_batch=True, **given)
        result = _paired_rows(query, positive_key, negative_keys, scale, normalize, options)
    else:
        options = options_of(query, keys.shape[0], in_batch=in_batch, **given)
        positive = None if in_batch else positive_key
        diagonals = (0,) if in_batch else ()
        if options.plain and reduction != "none" and exchange.world_size == 1:
            fused = pair_softmax_loss(
                query, positive, keys, scale,
                diagonals=diagonals, normalize=normalize, mean=reduction == "mean", backend=backend,
            )  # fmt: skip
            return with_stats(fused, scale, return_stats)
        result = contrastive_rows(
            exchange, query, keys, scale, positive,
            options=options, diagonals=diagonals, normalize=normalize, backend=backend,
        )  # fmt: skip
    loss = reduce_weighted(exchange, result.loss, reduction, options.row_weight, options.ignore)
    return with_stats(result._replace(loss=loss), scale, return_stats, options.ignore)


@overload
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    normalize: bool = True,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    decoupled: bool = False,
    hard_negative_beta: float = 0.0,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    normalize: bool = True,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    decoupled: bool = False,
    hard_negative_beta: float = 0.0,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, ContrastiveStats]: ...


def info_nce(
    query: Tensor,  # [N, D]
    positive_key: Tensor,  # [N, D]
    negative_keys: Tensor | None = None,  # [M, D] or [N, M, D]
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    normalize: bool = True,
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
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """``F.cross_entropy(F.normalize(query) @ F.normalize(positive_key).T / 0.1, arange(N))``.

    The loss of van den Oord et al., "Representation Learning with Contrastive Predictive Coding"
    (arXiv:1807.03748), computed as a sweep over tiles of the product: memory grows with N + M and
    not with N M. With ``negative_keys`` a row's logits are its positive's and its negatives'.

    Args:
        query: features [N, D].
        positive_key: features [N, D]; row i is the positive of query i. Without ``negative_keys``
            it is a negative of all other queries.
        negative_keys: None, or [M, D] negatives shared by all queries (``"unpaired"``), or
            [N, M, D] negatives of each query (``"paired"``: a batched product of plain torch, which
            holds N M logits).
        temperature: divides the similarities; a number, or a tensor of one element, which gets its
            gradient. A tensor's value is checked only on a CPU.
        reduction: "mean", "sum" or "none" (the loss of every row, [N]).
        negative_mode: "unpaired" or "paired".
        normalize: cosine similarities; False compares the features as they are. A zero row has
            similarity 0 to everything, and gradient 0.
        query_ids: int64 [N]; with ``key_ids``, a key that has a query's id and isn't its positive
            leaves the query's softmax: a false negative.
        key_ids: int64, an id for each key; in a batch, None means ``query_ids``.
        row_weight: [N], what each row's loss is multiplied by; a mean divides by their sum.
        ignore: bool [N]; these rows have no part in the loss, in a batch their keys neither: the
            result is that of the batch without them, whatever they hold.
        label_smoothing: as in ``F.cross_entropy``, in [0, 1).
        margin: subtracted from the positive's similarity.
        decoupled: the positive leaves the denominator (Yeh et al., arXiv:2110.06848).
        hard_negative_beta: how much harder negatives weigh more, beta of Robinson et al.
            (arXiv:2010.04592) with tau_plus = 0; 0 is none. Takes two sweeps.
        return_stats: give ``(loss, stats)``, stats a NamedTuple, detached: ``lse`` [N] over all
            keys of a row, ``top1``, the fraction of rows whose positive is no less similar than any
            negative, and ``positive_similarity``, its mean.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Features are float32, bfloat16, float16 or float64 (the reference's), all of one dtype and on
    one device; under autocast they are cast once. Products accumulate in fp32.

    Returns:
        The loss in nats, fp32 (float64 for float64 features). As in torch, the mean over an empty
        batch is NaN; without a negative (N = 1, none given) the loss is 0.

    Raises:
        TypeError: a feature or temperature of the wrong type or dtype.
        ValueError: shapes that don't fit, an empty ``negative_keys``, devices that differ, an
            unknown option, a temperature that isn't above 0.
        RuntimeError: ``backend`` can't serve this call.
    """
    return info_nce_over(
        Local(), query, positive_key, negative_keys, temperature, reduction, negative_mode,
        normalize=normalize, query_ids=query_ids, key_ids=key_ids, row_weight=row_weight,
        ignore=ignore, label_smoothing=label_smoothing, margin=margin, decoupled=decoupled,
        hard_negative_beta=hard_negative_beta, return_stats=return_stats, backend=backend,
    )  # fmt: skip


class InfoNCE(ContrastiveModule):
    """``info_nce`` as a module: the same options, the tensors given to ``forward``.

    A temperature that is an ``nn.Parameter`` is one of the module's parameters.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
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
        check_choice("negative_mode", negative_mode, NEGATIVE_MODES)
        self.negative_mode = negative_mode

    def options(self) -> dict[str, Any]:
        """The keyword arguments that ``info_nce`` is called with."""
        return {**super().options(), "negative_mode": self.negative_mode}

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        **per_row: Any,
    ) -> Any:
        """The loss of ``query`` [N, D] and its keys; ``(loss, stats)`` with ``return_stats``.

        ``per_row`` are ``query_ids``, ``key_ids``, ``row_weight`` and ``ignore``.
        """
        return info_nce(query, positive_key, negative_keys, **self.options(), **per_row)
