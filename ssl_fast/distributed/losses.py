"""The public functions: those of ``ssl_fast``, over the processes of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssl_fast.distributed.exchanges import exchange_over
from ssl_fast.losses import clip, siglip
from ssl_fast.losses import info_nce as info_nce_loss
from ssl_fast.losses import nt_xent as nt_xent_loss
from ssl_fast.losses import sup_con as sup_con_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["clip_loss", "info_nce", "nt_xent", "siglip_loss", "sup_con"]


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
    group: Any = None,
    mode: str = "ring",
    sizes: Sequence[int] | None = None,
) -> Any:
    """``ssl_fast.info_nce`` of all ranks' rows, each against the keys of all ranks.

    Args as there, shares of the global batch; ``negative_keys`` [M, D] are shares as well, and all
    of them count for every row (a queue that is the same on all ranks needs no exchange: take
    ``ssl_fast.info_nce``). ``group``, ``mode``, ``sizes``, gradients and errors: see
    ``ssl_fast.distributed``.
    """
    shared = negative_keys if negative_mode == "unpaired" else None
    exchange = exchange_over(group, mode, sizes, positive_key, others=shared)
    return info_nce_loss.info_nce_over(
        exchange, query, positive_key, negative_keys, temperature, reduction, negative_mode,
        normalize=normalize, query_ids=query_ids, key_ids=key_ids, row_weight=row_weight,
        ignore=ignore, label_smoothing=label_smoothing, margin=margin, decoupled=decoupled,
        hard_negative_beta=hard_negative_beta, return_stats=return_stats, backend=backend,
    )  # fmt: skip


def nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    query_ids: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    decoupled: bool = False,
    hard_negative_beta: float = 0.0,
    return_stats: bool = False,
    backend: str | None = None,
    group: Any = None,
    mode: str = "ring",
    sizes: Sequence[int] | None = None,
) -> Any:
    """``ssl_fast.nt_xent`` of all ranks' images, each view against all others of all ranks.

    Args as there, shares of the global batch. ``group``, ``mode``, ``sizes`` (images, of which each
    has two rows), gradients and errors: see ``ssl_fast.distributed``.
    """
    exchange = exchange_over(group, mode, sizes, z0, views=2)
    return nt_xent_loss.nt_xent_over(
        exchange, z0, z1, temperature, reduction, normalize=normalize, query_ids=query_ids,
        row_weight=row_weight, ignore=ignore, label_smoothing=label_smoothing, margin=margin,
        decoupled=decoupled, hard_negative_beta=hard_negative_beta, return_stats=return_stats,
        backend=backend,
    )  # fmt: skip


def clip_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    output_dict: bool = False,
    *,
    normalize: bool = False,
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
    group: Any = None,
    mode: str = "ring",
    sizes: Sequence[int] | None = None,
) -> Any:
    """``ssl_fast.clip_loss`` of all ranks' pairs, each side against all of the other.

    One rotation of the texts serves both directions. Args as there, shares of the global batch.
    ``group``, ``mode``, ``sizes``, gradients and errors: see ``ssl_fast.distributed``.
    """
    exchange = exchange_over(group, mode, sizes, text_features)
    return clip.clip_loss_over(
        exchange, image_features, text_features, logit_scale, logit_bias, output_dict,
        normalize=normalize, reduction=reduction, query_ids=query_ids, key_ids=key_ids,
        row_weight=row_weight, ignore=ignore, label_smoothing=label_smoothing, margin=margin,
        decoupled=decoupled, hard_negative_beta=hard_negative_beta, return_stats=return_stats,
        backend=backend,
    )  # fmt: skip


def siglip_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    output_dict: bool = False,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    group: Any = None,
    mode: str = "ring",
    sizes: Sequence[int] | None = None,
) -> Any:
    """``ssl_fast.siglip_loss`` over all pairs of all ranks' images and texts.

    Args as there, shares of the global batch. ``group``, ``mode``, ``sizes``, gradients and errors:
    see ``ssl_fast.distributed``. The gradient is made in the forward pass, while texts travel.
    """
    exchange = exchange_over(group, mode, sizes, text_features)
    return siglip.siglip_loss_over(
        exchange, image_features, text_features, logit_scale, logit_bias, output_dict,
        normalize=normalize, reduction=reduction, backend=backend,
    )  # fmt: skip


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
    group: Any = None,
    mode: str = "ring",
    sizes: Sequence[int] | None = None,
) -> Any:
    """``ssl_fast.sup_con`` of all ranks' anchors, each against the embeddings of all ranks.

    Args as there, shares of the global batch; ``ref_emb`` with its labels is a share as well, and
    all of them count for every anchor. ``group``, ``mode``, ``sizes``, gradients and errors: see
    ``ssl_fast.distributed``.
    """
    views = embeddings.shape[1] if getattr(embeddings, "ndim", 0) == 3 else 1
    exchange = exchange_over(group, mode, sizes, embeddings, views=views, others=ref_emb)
    return sup_con_loss.sup_con_over(
        exchange, embeddings, labels, temperature, ref_emb=ref_emb, ref_labels=ref_labels,
        normalize=normalize, reduction=reduction, query_ids=query_ids, key_ids=key_ids,
        row_weight=row_weight, ignore=ignore, label_smoothing=label_smoothing, margin=margin,
        decoupled=decoupled, hard_negative_beta=hard_negative_beta, return_stats=return_stats,
        backend=backend,
    )  # fmt: skip
