"""The C++ kernels of csrc/cpu: fp32, bfloat16 and float16 on the CPU."""

from __future__ import annotations

import torch

try:
    from ssl_fast import _native
except ImportError as error:  # a checkout without its compiled module
    _missing: str | None = f"the compiled module can't be imported ({error})"
else:
    _missing = None
    # An SSL_FAST_CPU_ISA that this machine can't run is an error here, not at the first loss.
    _native.active_isa()

__all__ = ["DTYPES", "refuses"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OPS = (
    "pair_softmax",
    "pair_sigmoid",
    "nearest",
    "centroid_update",
    "top_k",
    "plus_plus",
    "mae",
    "reconstruction",
    "kl_divergence",
    "l2_sp",
    "linear_reconstruction",
)


def refuses(op: str, device_type: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the C++ kernels can't serve such a call, or None."""
    if _missing is not None:
        return _missing
    if op not in OPS:
        return f"there is no C++ kernel for {op}"
    if device_type != "cpu":
        return f"the C++ kernels read CPU memory, not {device_type}"
    if dtype not in DTYPES:
        return f"the C++ kernels take float32, bfloat16 and float16, not {dtype}"
    if shape[-1] < 1:
        return "features without a dimension have no product"
    return None
