"""The one place that chooses a backend.

A backend is a package ``ssl_fast.backends.<name>`` that has a module per op and, in its
``__init__``, ``refuses(op, device_type, dtype, shape)``, which gives the reason why it can't serve
such a call, or None. ``op`` is the op's one name ("pair_softmax"; its gradient and its fused losses
go by the same name, and so does "nearest" with its Lloyd step) and ``shape`` the sizes of the
sweep, (N, M, D), of one problem where there is a batch of them; for "top_k" (k, N, M, D). Ops that
walk over numbers give (1,).
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["BACKENDS", "OPS", "PRIORITY", "Choice", "load", "package", "resolve", "select"]

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
BACKENDS = ("reference", "native", "triton")
# The first that doesn't refuse serves. The reference refuses nothing, so it ends every list.
PRIORITY: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("native", "triton", "reference"),
}

_packages: dict[str, ModuleType] = {}
_modules: dict[tuple[str, str], ModuleType] = {}
_warned: set[tuple[str, str]] = set()


class Choice(NamedTuple):
    """The backend that serves a call, and why each one before it was passed over."""

    name: str
    refused: dict[str, str]


def package(name: str) -> ModuleType:
    """The package of a backend, imported when it is first asked for."""
    found = _packages.get(name)
    if found is None:
        found = _packages[name] = importlib.import_module(f"ssl_fast.backends.{name}")
    return found


def load(name: str, op: str) -> ModuleType:
    """The module in which backend ``name`` keeps ``op``, imported when it is first asked for."""
    found = _modules.get((name, op))
    if found is None:
        found = importlib.import_module(f"ssl_fast.backends.{name}.{op}")
        _modules[name, op] = found
    return found


def _refuses(
    name: str, op: str, device_type: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> str | None:
    """The backend's own answer; a backend that can't be imported refuses with that reason."""
    try:
        backend = package(name)
    except ImportError as error:
        return f"can't be imported ({error})"
    reason: str | None = backend.refuses(op, device_type, dtype, shape)
    return reason


def resolve(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    backend: str | None = None,
) -> Choice:
    """Choose a backend: ``backend``, else ``SSL_FAST_BACKEND``, else the device's priority list.

    Changes nothing and warns of nothing. A backend asked for by name either serves or raises:
    ValueError when there is no such backend, RuntimeError with its reason when it refuses.
    """
    source = "backend"
    if not backend:
        source = "SSL_FAST_BACKEND"
        backend = os.environ.get(source)
    if backend:
        if backend not in BACKENDS:
            raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {backend!r}")
        reason = _refuses(backend, op, device_type, dtype, shape)
        if reason is not None:
            raise RuntimeError(
                f"{source}={backend!r} can't serve {op} on {device_type} with {dtype} and "
                f"sizes {tuple(shape)}: {reason}"
            )
        return Choice(backend, {})
    refused: dict[str, str] = {}
    for name in PRIORITY.get(device_type, ("reference",)):
        reason = _refuses(name, op, device_type, dtype, shape)
        if reason is None:
            return Choice(name, refused)
        refused[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise RuntimeError(f"no backend serves {op} on {device_type} with {dtype}: {reasons}")


def select(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    backend: str | None = None,
) -> Any:
    """The module that serves a call.

    A fall to the reference warns once per op and reason. float64 is the reference's
    by design: silence.
    """
    choice = resolve(op, device_type, dtype, shape, backend)
    if choice.refused and choice.name == "reference" and dtype is not torch.float64:
        reasons = "; ".join(f"{name} refused: {reason}" for name, reason in choice.refused.items())
        if (op, reasons) not in _warned:
            _warned.add((op, reasons))
            warnings.warn(
                f"ssl_fast: {op} on {device_type} runs on the reference, because {reasons}",
                RuntimeWarning,
                stacklevel=2,
            )
    return load(choice.name, op)
