"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ssl_fast.demo import memory

ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def describe(device: str = "cpu") -> dict[str, Any]:
    """CPU model, instruction set, cores, versions, threads and allocator."""
    native = native_module()
    total = memory.total_bytes()
    machine = {
        "cpu": cpu_model(),
        "isa": None if native is None else native.active_isa(),
        "isas": [] if native is None else list(native.available_isas()),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": None if total is None else round(total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator": allocator(),
        "transparent_hugepage": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
    }
    if device == "cuda":
        machine["card"] = torch.cuda.get_device_name(0)
        machine["cuda"] = torch.version.cuda
    return machine


def sentence(machine: dict[str, Any]) -> str:
    """The description in one line."""
    parts = [
        machine.get("card") or machine["cpu"],
        f"{machine['cores']} cores, {machine['threads']} threads",
        f"ISA {machine['isa'] or 'none (no native kernels)'}",
        f"{machine['memory_gib']} GiB",
        f"torch {machine['torch']}",
        f"Python {machine['python']}",
        f"{machine['allocator']}, huge pages {machine['transparent_hugepage'] or 'unknown'}",
    ]
    return "; ".join(parts)


def native_module() -> Any:
    """ssl_fast's compiled module, or None where it was not built."""
    try:
        from ssl_fast import _native
    except ImportError:
        return None
    return _native


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allocator() -> str:
    """The malloc in use: a preloaded one, or the C library's."""
    mapped = _text("/proc/self/maps")
    for name in ALLOCATORS:
        if f"lib{name}" in mapped:
            return name
    library, version = platform.libc_ver()
    return f"{library or 'system'} malloc {version}".strip()


def _chosen(path: str) -> str | None:
    """The bracketed word of a kernel setting such as ``always [madvise] never``."""
    text = _text(path)
    return text.partition("[")[2].partition("]")[0] or None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
