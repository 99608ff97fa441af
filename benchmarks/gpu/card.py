"""What the run was made on."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu import peers


def describe(device: str = "cuda") -> dict[str, Any]:
    """The machine's description with the card's memory, its driver, Triton and the peers."""
    found = machine.describe(device)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver(),
        }
    return found | {"triton": triton_version(), "peers": peers.versions()}


def sentence(found: dict[str, Any]) -> str:
    """The description in one line."""
    others = ", ".join(f"{name} {version or 'absent'}" for name, version in found["peers"].items())
    return "; ".join(
        [
            found.get("card") or found["cpu"],
            f"driver {found.get('driver') or 'unknown'}",
            f"CUDA {found.get('cuda') or 'none'}",
            f"torch {found['torch']}",
            f"Triton {found['triton'] or 'none'}",
            f"Python {found['python']}",
            others,
        ]
    )


def triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def driver() -> str | None:
    """The driver's version as nvidia-smi gives it; torch knows none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)
