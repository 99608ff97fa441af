"""Peak extra memory of one pass, and what the machine can give."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from typing import TYPE_CHECKING

import torch

from benchmarks.sides import BY_NAME, Side
from ssl_fast.demo import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.cases import Case

NOT_KEPT = "the C library keeps no large buffers"
# glibc's numbers of two of its options, and their defaults: what is free at the heap's end before
# it goes back to the system, and how many buffers may come from the system one by one.
_TRIM_THRESHOLD, _TRIMMED = -1, 128 << 10
_MMAP_MAX, _MAPPED = -4, 65536


def peak_extra_bytes(case: Case, side: Side) -> int | None:
    """Peak memory of one pass beyond its inputs and the gradients it returns.

    On a CPU in a child process, by the kernel's high-water mark; on a GPU by torch's counter.
    """
    if case.device == "cuda":
        step = side.step(case)
        step()
        peak: int | None = cuda_peak(step)
    else:
        peak = memory.peak_extra_bytes(job, case, side.name)
    return None if peak is None else max(0, peak - case.gradient_bytes)


def job(case: Case, side_name: str) -> Callable[[], object]:
    """For the child: a warmed-up step of one side."""
    side = BY_NAME[side_name]
    step = side.step(case)
    # What is compiled is compiled for one size; everything else loads its libraries at a small one.
    warm_up = step if side.compiled else side.step(case.small())
    warm_up()
    gc.collect()
    trim()
    return step


def too_large(case: Case, side: Side) -> str | None:
    """Why a side would take more than half of the memory there is, or None."""
    total = device_bytes(case.device)
    needed = side.bytes_needed(case)
    if total is None or needed <= total / 2:
        return None
    return f"would need {needed / 2**30:.0f} GiB, over half of {total / 2**30:.0f} GiB"


def device_bytes(device: str) -> int | None:
    """All the memory of the machine or of the card."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return memory.total_bytes()


def cuda_peak(step: Callable[[], object]) -> int:
    """The peak beyond what was there, results included, of a step that is warm."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before


def trim() -> None:
    """Give the warm-up's freed pages back, or the step would reuse them unseen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


@contextlib.contextmanager
def kept_buffers() -> Iterator[bool]:
    """While it is open, malloc hands freed buffers of any size out again, their pages in place.

    Gives whether it does: only glibc can be asked.
    """
    try:
        option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        yield False
        return
    kept = bool(option(_MMAP_MAX, 0) and option(_TRIM_THRESHOLD, (1 << 31) - 1))
    try:
        yield kept
    finally:
        option(_MMAP_MAX, _MAPPED)
        option(_TRIM_THRESHOLD, _TRIMMED)
        trim()
