"""CLIP: images and texts, each image against all texts and each text against all images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ssl_fast.losses.contrastive import (
    accept_features,
    check_options,
    check_same,
    check_scalar,
    scalar_from,
    with_stats,
)
from ssl_fast.losses.exchange import Local
from ssl_fast.losses.options import Options, check_numbers, options_of, reduce_weighted
from ssl_fast.losses.rows import contrastive_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ClipLoss", "clip_loss"]


def clip_loss_over(
    exchange: Local,
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    output_dict: bool,
    *,
    normalize: bool,
    reduction: str,
    return_stats: bool,
    backend: str | None,
    **given: Any,
) -> Any:
    """``clip_loss`` where the other pairs may be those of many processes; ``given``: options."""
    check_options(reduction, backend)
    images = accept_features("image_features", image_features, "[N, D]")
    texts = accept_features("text_features", text_features, "[N, D]")
    sizes = {0: "rows", -1: "components"}
    check_same("text_features", texts, "image_features", images, sizes=sizes)
    check_scalar("logit_scale", logit_scale)
    scale = scalar_from("logit_scale", logit_scale, images)
    options = options_of(images, texts.shape[0], in_batch=True, **given)
    result, text_losses = contrastive_pairs(
        exchange, images, texts, scale, None,
        options=options, diagonals=(0,), normalize=normalize, columns=True, backend=backend,
    )  # fmt: skip
    losses = 0.5 * (result.loss + text_losses)
    loss = reduce_weighted(exchange, losses, reduction, options.row_weight, options.ignore)
    if logit_bias is not None:
        check_scalar("logit_bias", logit_bias)
        # A constant leaves a softmax as it is; a parameter still gets its gradient, zero.
        loss = loss + 0.0 * scalar_from("logit_bias", logit_bias, images)
    made = with_stats(result._replace(loss=loss), scale, return_stats, options.ignore)
    if not output_dict:
        return made
    named, *stats = made if return_stats else (made,)
    return ({"contrastive_loss": named}, *stats) if stats else {"contrastive_loss": named}


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
) -> Any:
    """``(F.cross_entropy(s, arange(N)) + F.cross_entropy(s.T, arange(N))) / 2``.

    Here s is ``logit_scale * image_features @ text_features.T``. The loss of Radford et al.,
    "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020), in
    one sweep for both directions and a second one for the gradient: four products, and memory grows
    with N. Called as open_clip's.

    Args:
        image_features: [N, D].
        text_features: [N, D]; row i belongs to image i.
        logit_scale: multiplies the products (open_clip passes its parameter's ``exp()``); a number,
            or a tensor of one element, which gets its gradient.
        logit_bias: cancels in a softmax; accepted, and its gradient is 0.
        output_dict: give ``{"contrastive_loss": loss}``.
        normalize: divide the rows by their norms first; callers of open_clip's have done so.
        reduction: "mean", "sum" or "none" (of each pair, the mean of both directions, [N]).
        query_ids: int64 [N], ids of the images; a pair with equal ids that isn't a positive leaves
            both softmaxes.
        key_ids: int64 [N], ids of the texts; None means ``query_ids``.
        row_weight: [N], what a pair's loss is multiplied by; a mean divides by their sum.
        ignore: bool [N]; these pairs have no part in the loss.
        label_smoothing: as in ``F.cross_entropy``, in [0, 1), for both directions.
        margin: subtracted from the positive's product, before the scale.
        decoupled: the positive leaves the denominator, as in ``info_nce``.
        hard_negative_beta: how much harder negatives weigh more, as in ``info_nce``.
        return_stats: give ``(loss, stats)``; stats as ``info_nce``'s, for images against texts.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Features are float32, bfloat16, float16 or float64 (the reference's), both of one dtype and on
    one device; under autocast they are cast once. Products accumulate in fp32.

    Returns:
        The loss in nats, fp32 (float64 for float64 features).

    Raises:
        TypeError: a feature, scale, bias or option of the wrong type or dtype.
        ValueError: shapes that don't fit, devices that differ, an option out of range.
        RuntimeError: ``backend`` can't serve this call.
    """
    return clip_loss_over(
        Local(), image_features, text_features, logit_scale, logit_bias, output_dict,
        normalize=normalize, reduction=reduction, query_ids=query_ids, key_ids=key_ids,
        row_weight=row_weight, ignore=ignore, label_smoothing=label_smoothing, margin=margin,
        decoupled=decoupled, hard_negative_beta=hard_negative_beta, return_stats=return_stats,
        backend=backend,
    )  # fmt: skip


class ClipLoss(nn.Module):
    """``clip_loss`` as a module with open_clip's arguments.

    With ``world_size`` above 1 it is ``ssl_fast.distributed.clip_loss`` over the default process
    group: the loss of the global batch on every rank. ``local_loss``, ``gather_with_grad`` and
    ``cache_labels`` are accepted and change nothing: whichever are given, the gradient that
    DistributedDataParallel averages is that of the global loss. (open_clip's is that only with
    ``gather_with_grad``: its default flags give half of the features' gradient at two ranks, and
    ``local_loss`` alone one of another direction.)
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        decoupled: bool = False,
        hard_negative_beta: float = 0.0,
        return_stats: bool = False,
        backend: str | None = None,
        mode: str = "ring",
    ) -> None:
        super().__init__()
        check_options(reduction, backend)
        numbers = {
            "label_smoothing": label_smoothing,
            "margin": margin,
            "decoupled": decoupled,
            "hard_negative_beta": hard_negative_beta,
        }
        check_numbers(Options(**numbers))  # type: ignore[arg-type]
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.mode = mode
        self.options: dict[str, Any] = {
            "normalize": normalize,
            "reduction": reduction,
            "return_stats": return_stats,
            "backend": backend,
            **numbers,
        }

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        **per_row: Any,
    ) -> Any:
        """The loss of this rank's pairs [N, D] in the global batch.

        ``per_row`` are ``query_ids``, ``key_ids``, ``row_weight`` and ``ignore``; with several
        ranks also ``sizes`` and ``group``.
        """
        function: Callable[..., Any] = clip_loss
        exchange = {}
        if self.world_size > 1:
            from ssl_fast import distributed

            function, exchange = distributed.clip_loss, {"mode": self.mode}
        return function(
            image_features, text_features, logit_scale, logit_bias, output_dict,
            **self.options, **exchange, **per_row,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        shown = {"rank": self.rank, "world_size": self.world_size, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
