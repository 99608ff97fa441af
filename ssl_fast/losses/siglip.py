"""SigLIP: images and texts, every pair a decision of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssl_fast.losses.contrastive import (
    accept_features,
    check_choice,
    check_options,
    check_same,
    check_scalar,
    scalar_from,
)
from ssl_fast.losses.exchange import Local
from ssl_fast.losses.rows import key_norms

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SigLipLoss", "siglip_loss"]

# How open_clip's ways of exchanging texts map to ours; all give the same loss and gradient.
MODES = {None: "ring", "bidir": "ring", "shift": "ring", "reduce": "all_gather",
         "gather": "all_gather"}  # fmt: skip


def siglip_loss_over(
    exchange: Local,
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    output_dict: bool,
    *,
    normalize: bool,
    reduction: str,
    backend: str | None,
) -> Any:
    """``siglip_loss`` where the other pairs may be those of many processes."""
    check_options(reduction, backend)
    images = accept_features("image_features", image_features, "[N, D]")
    texts = accept_features("text_features", text_features, "[N, D]")
    sizes = {0: "rows", -1: "components"}
    check_same("text_features", texts, "image_features", images, sizes=sizes)
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    scale = scalar_from("logit_scale", logit_scale, images)
    bias = scalar_from("logit_bias", logit_bias, images)
    rows = images.shape[0]
    query_scale, key_scale = scale.expand(rows), scale.new_ones(rows)
    if normalize:
        query_scale, key_scale = scale * key_norms(images), key_norms(texts)
    loss = exchange.pair_sigmoid(
        images, texts, query_scale, key_scale, bias, reduce=reduction != "none", backend=backend
    )
    if reduction == "mean":
        total = exchange.total(torch.stack([loss, loss.new_full((), rows)]))
        loss = total[0] / total[1]
    elif reduction == "sum":
        loss = exchange.total(loss)
    return {"contrastive_loss": loss} if output_dict else loss


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
) -> Any:
    """``-F.logsigmoid(labels * s).sum() / N``, labels 1 on the diagonal and -1 elsewhere.

    Here s is ``logit_scale * image_features @ text_features.T + logit_bias``. The loss of Zhai et
    al., "Sigmoid Loss for Language Image Pre-Training" (arXiv:2303.15343), with its gradient in one
    pass of three products, and memory that grows with N. Called as open_clip's.

    Args:
        image_features: [N, D].
        text_features: [N, D]; row i belongs to image i.
        logit_scale: multiplies the products (open_clip passes its parameter's ``exp()``); a number,
            or a tensor of one element, which gets its gradient.
        logit_bias: added to the logits; likewise.
        output_dict: give ``{"contrastive_loss": loss}``.
        normalize: divide the rows by their norms first; callers of open_clip's have done so.
        reduction: "mean" (over images, of the sum over texts), "sum" or "none" (each image's, [N]).
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Features are float32, bfloat16, float16 or float64 (the reference's), both of one dtype and on
    one device; under autocast they are cast once. Products accumulate in fp32.

    Returns:
        The loss in nats, fp32 (float64 for float64 features).

    Raises:
        TypeError: a feature, scale or bias of the wrong type or dtype.
        ValueError: shapes that don't fit, devices that differ, an unknown option.
        RuntimeError: ``backend`` can't serve this call.
    """
    return siglip_loss_over(
        Local(), image_features, text_features, logit_scale, logit_bias, output_dict,
        normalize=normalize, reduction=reduction, backend=backend,
    )  # fmt: skip


class SigLipLoss(nn.Module):
    """``siglip_loss`` as a module with open_clip's arguments.

    With ``world_size`` above 1 it is ``ssl_fast.distributed.siglip_loss`` over the default process
    group: the loss of the global batch on every rank. ``dist_impl`` is open_clip's "bidir" or
    "shift" (a ring), "reduce" or "gather" (texts gathered); the result is the same.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_options(reduction, backend)
        if dist_impl is not None:
            check_choice("dist_impl", dist_impl, [name for name in MODES if name is not None])
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.options: dict[str, Any] = {
            "normalize": normalize,
            "reduction": reduction,
            "backend": backend,
        }

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        output_dict: bool = False,
        **exchange: Any,
    ) -> Any:
        """The loss of this rank's pairs [N, D] in the global batch.

        With several ranks ``exchange`` may hold ``sizes`` and ``group``.
        """
        function: Callable[..., Any] = siglip_loss
        if self.world_size > 1:
            from ssl_fast import distributed

            function, exchange = (
                distributed.siglip_loss,
                {"mode": MODES[self.dist_impl], **exchange},
            )
        return function(
            image_features, text_features, logit_scale, logit_bias, output_dict,
            **self.options, **exchange,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        shown = {"rank": self.rank, "world_size": self.world_size, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
