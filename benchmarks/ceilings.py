"""What the machine can do at best, measured: FMA peak, torch's matrix product, copy bandwidth.

``python -m benchmarks.ceilings`` prints them.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import torch

from benchmarks.cases import DTYPES
from benchmarks.machine import native_module

if TYPE_CHECKING:
    from collections.abc import Callable

PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = 256 * 2**20


def measure(device: str = "cpu", seconds: float = 0.4) -> dict[str, float]:
    """Ceilings of the device with torch's thread count.

    GFLOP/s of ``fma_fp32`` and ``fma_bf16`` (a loop of independent fused multiply-adds in
    registers; absent without native kernels), ``product_*`` (a large torch matmul), and
    ``copy_gb_s`` (bytes read plus bytes written).
    """
    ceilings = {}
    for dtype in DTYPES:
        if device == "cpu":
            peak = fma_peak(dtype, seconds)
            if peak is not None:
                ceilings[f"fma_{dtype}"] = round(peak, 1)
        size = PRODUCT_SIZE[device]
        a = torch.randn(size, size, device=device).to(DTYPES[dtype])
        rate = 2.0 * size**3 / _fastest(lambda a=a: a @ a, device, seconds)
        ceilings[f"product_{dtype}"] = round(rate / 1e9, 1)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source).zero_()  # its pages are resident before the clock runs
    moved = 2.0 * COPY_BYTES / _fastest(lambda: target.copy_(source), device, seconds)
    ceilings["copy_gb_s"] = round(moved / 1e9, 1)
    return ceilings


def fma_peak(dtype: str, seconds: float) -> float | None:
    """GFLOP/s of the machine's multiply-add units with torch's thread count, or None."""
    native = native_module()
    if native is None:
        return None
    try:
        peak: float = native.fma_peak(dtype, torch.get_num_threads(), seconds)
    except (ValueError, RuntimeError):
        return None  # the instruction set in use has no product in this dtype
    return peak if peak > 0 else None


def raise_peak(ceilings: dict[str, float], dtype: str, seconds: float) -> None:
    """Measure a multiply-add peak again and keep the higher: a busy moment only lowers it."""
    peak = fma_peak(dtype, seconds)
    if peak is not None:
        name = f"fma_{dtype}"
        ceilings[name] = max(ceilings.get(name, 0.0), round(peak, 1))


def share_of(
    device: str, dtype: str, gflops: float, ceilings: dict[str, float]
) -> tuple[str | None, float | None]:
    """The name of the ceiling that a rate is held against, and the part of it reached."""
    # Without a product in bf16, bf16 features are multiplied in fp32.
    names = {
        "cpu": (f"fma_{dtype}", "fma_fp32"),
        "cuda": (f"product_{dtype}",),
    }[device]
    name = next((name for name in names if name in ceilings), None)
    return name, None if name is None else gflops / ceilings[name]


def _fastest(call: Callable[[], object], device: str, seconds: float) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    synchronize()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
