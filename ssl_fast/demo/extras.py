"""Imports of the packages that only the demo needs."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


class MissingExtraError(RuntimeError):
    """A package of the ``demo`` extra is not installed."""


def require(module: str) -> ModuleType:
    """Import ``module`` (dotted names allowed), or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = PACKAGES.get(module.partition(".")[0])
        if package is None or error.name not in (module.partition(".")[0], module):
            raise
        raise MissingExtraError(_message([package])) from error


def require_all() -> None:
    """Check every package of the extra at once, before any work is done."""
    missing = [PACKAGES[name] for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(_message(missing))


def _message(missing: list[str]) -> str:
    names = ", ".join(missing)
    return f"the demo needs {names}: install with  pip install ssl_fast[demo]"
