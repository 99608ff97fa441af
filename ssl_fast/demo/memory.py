"""Peak memory of one call, as the operating system sees it.

The call runs in a fresh child process and the kernel's own high-water mark (VmHWM) is read, so
that every allocator counts: torch's, the C++ core's, and the threads' workspaces.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import torch

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

P = ParamSpec("P")

# A function that prepares inputs and warms up, and returns the call to measure. It crosses a
# process boundary, so it must be importable (no lambda, no closure).
Job = Callable[P, Callable[[], object]]


def peak_extra_bytes(job: Job[P], *args: P.args, **kwargs: P.kwargs) -> int | None:
    """Bytes by which the measured call raises the child's resident memory at its highest point.

    Everything resident before the call (imports, inputs) is left out; what the call returns is
    counted.  None where the system has no such counter, or the child was killed for memory.
    """
    if read_status_bytes("VmHWM") is None:
        return None
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        try:
            return pool.submit(_measure, torch.get_num_threads(), job, *args, **kwargs).result()
        except (BrokenProcessPool, MemoryError):
            return None


def _measure(threads: int, job: Job[P], /, *args: P.args, **kwargs: P.kwargs) -> int | None:
    torch.set_num_threads(threads)
    call = job(*args, **kwargs)
    reset_peak()
    before = read_status_bytes("VmRSS")
    kept = call()  # held until the mark is read, so that the outputs count
    peak = read_status_bytes("VmHWM")
    del kept
    if before is None or peak is None:
        return None
    return max(0, peak - before)


def reset_peak() -> None:
    """Lower this process's VmHWM to what is resident now, where the kernel allows it."""
    # Where it does not, the mark stays at the process's earlier peak: a job's warm-up is small, so
    # what a large call adds is still seen.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_status_bytes(field: str) -> int | None:
    """A counter of /proc/self/status (VmRSS, VmHWM, ...), or None where there is none."""
    return _read_kib("/proc/self/status", field)


def available_bytes() -> int | None:
    """Memory that the machine can still give without swapping; None where unknown."""
    return _read_kib("/proc/meminfo", "MemAvailable")


def total_bytes() -> int | None:
    """Memory of the machine; None where unknown."""
    return _read_kib("/proc/meminfo", "MemTotal")


def _read_kib(path: str, field: str) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


@cache
def _context() -> BaseContext:
    # A fork server imports torch once and forks before any thread pool exists: a measurement then
    # costs milliseconds where a spawned child pays seconds of imports. ssl_fast itself is left to
    # the child, which has this process's sys.path; the server has its own.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context
