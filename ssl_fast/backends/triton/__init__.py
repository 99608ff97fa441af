"""Triton kernels, for GPUs; on CPU tensors only in Triton's interpreter, which tests them."""

import importlib.util
import os

import torch

# Rows are counted in int32 inside the kernels, where two such numbers are added at most.
MOST_ROWS = 2**30
# top_k holds a row's neighbours in registers.
MOST_NEIGHBOURS = 64
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
    """Why this backend can't serve a call, or None; shape is the sizes of the sweep, (N, M, D).

    For top_k (k, N, M, D).
    """
    if op not in OPS:
        return f"it has no kernel for {op}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if max(shape, default=0) > MOST_ROWS:
        return f"it counts rows in 32 bits: {MOST_ROWS} at most, not {max(shape)}"
    if op == "top_k" and len(shape) == 4 and shape[0] > MOST_NEIGHBOURS:
        return f"it keeps {MOST_NEIGHBOURS} neighbours at most, not {shape[0]}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu":
        return _refuses_cpu()
    if device_type == "cuda":
        return _refuses_cuda()
    return f"it runs on cuda devices, not on {device_type}"


def _refuses_cpu() -> str | None:
    if os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"}:
        return None
    return "CPU tensors run in Triton's interpreter alone, which TRITON_INTERPRET=1 selects"


def _refuses_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"it needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    return None
