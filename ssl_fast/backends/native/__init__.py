"""The kernels of csrc: C++ on the CPU, CUDA for some ops; fp32, bfloat16 and float16."""

from __future__ import annotations

from functools import cache

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

# The least capability that the CUDA kernels are built for.
_CAPABILITY = (8, 0)
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
CUDA_OPS = ("centroid_update", "reconstruction", "l2_sp")


def refuses(op: str, device_type: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why these kernels can't serve such a call, or None."""
    if _missing is not None:
        return _missing
    if op not in OPS:
        return f"there is no C++ kernel for {op}"
    if device_type not in ("cpu", "cuda"):
        return f"the C++ kernels read CPU and CUDA memory, not {device_type}"
    if device_type == "cuda" and op not in CUDA_OPS:
        return f"there is no CUDA kernel for {op}"
    if dtype not in DTYPES:
        return f"the C++ kernels take float32, bfloat16 and float16, not {dtype}"
    if shape[-1] < 1:
        return "features without a dimension have no product"
    if device_type == "cuda":
        return _refuses_cuda()
    return None


def _refuses_cuda() -> str | None:
    if not _native.cuda:
        return "its CUDA kernels were not built, for lack of nvcc"
    if torch.version.hip is not None:
        return "its CUDA kernels don't run on ROCm"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _refuses_device(torch.cuda.current_device())


@cache
def _refuses_device(index: int) -> str | None:
    if (capability := torch.cuda.get_device_capability(index)) < _CAPABILITY:
        return f"it needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    reason: str | None = _native.use_device(index)
    return None if reason is None else f"CUDA says: {reason}"
