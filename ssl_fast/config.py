"""What this installation runs on."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from ssl_fast.backends import dispatch

__all__ = ["config_text", "show_config"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _native() -> str:
    """The instruction sets that the compiled module holds, those this CPU runs, the one in use."""
    try:
        from ssl_fast import _native as module
    except ImportError as error:
        return f"not built ({error})"
    compiled, available = module.compiled_isas(), module.available_isas()
    return (
        f"uses {module.active_isa()}; this CPU runs {', '.join(available)} of "
        f"{', '.join(compiled)}; threads: {module.threading}"
    )


def _cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch was built without it"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda or torch.version.hip}, no device"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"{torch.version.cuda or torch.version.hip}, {', '.join(sorted(names))}"


def _serving(op: str, device_type: str) -> list[str]:
    """Which backend serves each dtype at ordinary sizes and why others don't, one answer a line."""
    answers: dict[str, list[str]] = {}
    for dtype in DTYPES:
        try:
            choice = dispatch.resolve(op, device_type, dtype, (1024, 1024, 128))
        except (RuntimeError, ValueError) as error:
            answer = str(error)
        else:
            refused = (f"{name} refused: {why}" for name, why in choice.refused.items())
            answer = "; ".join((choice.name, *refused))
        answers.setdefault(answer, []).append(str(dtype).removeprefix("torch."))
    return [
        f"{op} on {device_type}, {', '.join(dtypes)}: {answer}"
        for answer, dtypes in answers.items()
    ]


def config_text() -> str:
    """What ``show_config`` prints."""
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    lines = [
        f"ssl_fast {_version('ssl_fast')}",
        f"python {platform.python_version()}, torch {torch.__version__}, {machine}",
        f"native: {_native()}",
        f"cuda: {_cuda()}",
        f"triton: {_version('triton')}",
    ]
    named = ("SSL_FAST_BACKEND", "SSL_FAST_CPU_ISA", "TRITON_INTERPRET")
    lines.extend(f"{name}={os.environ[name]}" for name in named if name in os.environ)
    for op in dispatch.OPS:
        for device_type in dispatch.PRIORITY:
            if device_type != "cuda" or torch.cuda.is_available():
                lines.extend(_serving(op, device_type))
    return "\n".join(lines)


def show_config() -> None:
    """Print versions, what the CPU and GPU offer, and which backend serves each op where."""
    print(config_text())
