"""kl_divergence on Triton: one pass, whose sums of blocks torch adds up in float64.

The function and its arguments are the reference's (backends/reference/kl_divergence.py).
"""

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import kl_divergence_kernels as kernels
from ssl_fast.backends.triton.device import launching_on

__all__ = ["kl_divergence"]

BLOCK = 1024


def kl_divergence(mu: Tensor, logvar: Tensor, need_logvar: bool) -> tuple[Tensor, Tensor]:
    """The divergence and the gradient of logvar."""
    with launching_on(mu):
        mu, logvar = mu.contiguous(), logvar.contiguous()
        size = mu.numel()
        programs = triton.cdiv(size, BLOCK)
        sums = torch.empty(programs, dtype=torch.float32, device=mu.device)
        grad = torch.empty(
            logvar.shape if need_logvar else 0, dtype=torch.float32, device=mu.device
        )
        if size:
            kernels.divergence_kernel[(programs,)](
                mu, logvar, sums, grad if need_logvar else sums, size,
                HAS_GRAD=need_logvar, BLOCK=BLOCK,
            )  # fmt: skip
        total = sums.sum(dtype=torch.float64) / kernels.SMALL.value
        largest = torch.finfo(torch.float32).max
        value = torch.where(total.isinf(), total, total.clamp(-largest, largest))
    return value.float(), grad
