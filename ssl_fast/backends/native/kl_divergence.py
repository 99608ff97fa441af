"""kl_divergence on the CPU: from tensors to the pointers of csrc/cpu/kl_divergence.cpp.

The function and its arguments are the reference's (backends/reference/kl_divergence.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import check, gradient, run, threads_for

__all__ = ["kl_divergence"]


def kl_divergence(mu: Tensor, logvar: Tensor, need_logvar: bool) -> tuple[Tensor, Tensor]:
    """The divergence and the gradient of logvar, from one pass."""
    check("mu", mu, tuple(mu.shape), mu.dtype)
    check("logvar", logvar, tuple(mu.shape), mu.dtype)
    # Contiguous copies must outlive the call: they are held by these names.
    mu, logvar = mu.resolve_neg().contiguous(), logvar.resolve_neg().contiguous()
    value = torch.empty((), dtype=torch.float32)
    grad_logvar = gradient(logvar, need_logvar, torch.float32)
    held = {"mu": mu, "logvar": logvar, "value": value}
    if need_logvar:
        held["grad_logvar"] = grad_logvar
    run(
        _native.kl_divergence(
            DTYPES[mu.dtype],
            mu.numel(),
            threads_for(mu.numel()),
            {name: tensor.data_ptr() for name, tensor in held.items()},
        )
    )
    return value, grad_logvar
