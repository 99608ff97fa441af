"""The loss of variational autoencoders: a reconstruction and the divergence of the latents."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssl_fast.losses.contrastive import describe
from ssl_fast.losses.pointwise import accept_target, check_floating, check_rules
from ssl_fast.ops.kl_divergence import kl_divergence
from ssl_fast.ops.reconstruction import Rules, reconstruction

__all__ = ["VAELoss", "VAETerms", "vae_loss"]

REDUCTIONS = ("batchmean", "sum", "mean")


class VAETerms(NamedTuple):
    """The loss of a VAE and its two terms, fp32 (float64 of float64), each differentiable."""

    loss: Tensor  # []: reconstruction + beta * kl
    reconstruction: Tensor  # []
    kl: Tensor  # []


def _beta(beta: Any) -> float:
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta must be a number; got {describe(beta)}")
    if not math.isfinite(beta) or beta < 0.0:
        raise ValueError(f"beta must be finite and at least 0; got {beta}")
    return float(beta)


def _check_latents(mu: Any, logvar: Any, recon: Tensor) -> None:
    check_floating("mu", mu)
    check_floating("logvar", logvar)
    for name, value in (("mu", mu), ("logvar", logvar)):
        if value.device != recon.device:
            raise ValueError(f"{name} must be on {recon.device}; got {value.device}")
    if mu.dim() < 1 or mu.shape[0] != recon.shape[0]:
        raise ValueError(
            f"mu must have a row for each of the {recon.shape[0]} of recon; got {tuple(mu.shape)}"
        )
    if logvar.shape != mu.shape:
        raise ValueError(
            f"logvar must have the shape of mu, {tuple(mu.shape)}; got {tuple(logvar.shape)}"
        )


def vae_loss(
    recon: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
    mu: Tensor,  # [B, ...]
    logvar: Tensor,  # [B, ...]
    *,
    beta: float = 1.0,
    kind: str = "bce_with_logits",
    reduction: str = "batchmean",
    backend: str | None = None,
) -> VAETerms:
    """``(F.<kind>(recon, target, reduction="sum") + beta * kl) / len(recon)``, in nats.

    kl is ``-0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())``, the divergence of the
    latents' normal distributions from the standard one; its value and gradients come from one pass,
    as the reconstruction's. exp(logvar) stops at the largest finite number: the divergence of a
    log-variance above 88.7 stays finite. Kingma and Welling, "Auto-Encoding Variational Bayes"
    (arXiv:1312.6114); beta as in Higgins et al., "beta-VAE" (2017).

    Args:
        recon: the reconstruction [B, ...]; with the default kind its logits.
        target: of the same shape, of a floating dtype of its own or uint8, read as numbers 0 to
            255.
        mu: the means of the latents [B, ...].
        logvar: the logarithms of their variances, of the shape of mu.
        beta: of the divergence, a number, at least 0.
        kind: the reconstruction's, as of ``reconstruction_loss``.
        reduction: "batchmean" divides both sums by B; "sum" by nothing; "mean" by the number of
            elements of recon, so that the balance of the terms is the same for all three.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    Tensors are float32, bfloat16, float16 or float64 (the reference's). Differentiable in all but
    uint8, to any order.

    Returns:
        VAETerms: loss, reconstruction and kl, each reduced; 0 of an empty batch.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that differ, an option out of range; on the CPU, "bce" of
            numbers outside [0, 1].
        RuntimeError: ``backend`` can't serve this call.
    """
    check_rules(kind, reduction, backend, REDUCTIONS)
    beta = _beta(beta)
    check_floating("recon", recon)
    if recon.dim() < 1:
        raise ValueError(f"recon must have a dimension for the batch; got {tuple(recon.shape)}")
    target = accept_target(target, recon.shape, recon.device)
    _check_latents(mu, logvar, recon)
    floating = [x.dtype for x in (recon, target, mu, logvar) if x.is_floating_point()]
    if torch.float64 in floating:
        recon, mu, logvar = recon.double(), mu.double(), logvar.double()
        target = target if target.dtype is torch.uint8 else target.double()
    latents = torch.promote_types(mu.dtype, logvar.dtype)
    divisor = {"batchmean": recon.shape[0], "sum": 1, "mean": recon.numel()}[reduction]
    factor = 1.0 / max(divisor, 1)
    reconstructed = reconstruction(recon, target, Rules(kind, factor=factor), backend=backend)
    kl = factor * kl_divergence(mu.to(latents), logvar.to(latents), backend=backend)
    return VAETerms(reconstructed + beta * kl, reconstructed, kl)


class VAELoss(nn.Module):
    """``vae_loss`` as a module: ``VAELoss(beta=4.0)(recon, target, mu, logvar).loss``."""

    def __init__(
        self,
        *,
        beta: float = 1.0,
        kind: str = "bce_with_logits",
        reduction: str = "batchmean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_rules(kind, reduction, backend, REDUCTIONS)
        self.beta, self.kind, self.reduction = _beta(beta), kind, reduction
        self.backend = backend

    def forward(self, recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> VAETerms:
        """The loss and its terms; see ``vae_loss``."""
        return vae_loss(
            recon, target, mu, logvar,
            beta=self.beta, kind=self.kind, reduction=self.reduction, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return (
            f"beta={self.beta}, kind={self.kind!r}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )
