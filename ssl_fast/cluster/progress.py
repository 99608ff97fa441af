"""How far a fit has come, on stderr: a bar of tqdm where that is installed, else lines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Progress"]


class Progress:
    """A bar of ``total`` steps; silent unless ``shown``. A context manager."""

    def __init__(self, title: str, total: int, *, shown: bool) -> None:
        self.title, self.total, self.shown = title, total, shown
        self.bar: Any = None
        if shown:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, desc=title, leave=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, number: int, **figures: float) -> None:
        """Step ``number``, from 1, is done."""
        if not self.shown:
            return
        texts = {name: f"{value:.6g}" for name, value in figures.items()}
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix(texts)
            return
        listed = ", ".join(f"{name} {text}" for name, text in texts.items())
        sys.stderr.write(f"{self.title} {number}/{self.total}: {listed}\n")
