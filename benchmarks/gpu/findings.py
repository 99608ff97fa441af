"""What the run is made of: tasks, the place they run in, and the findings they leave."""

from __future__ import annotations

import gc
import traceback
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

GROUPS = ("correctness", "large", "determinism", "graph", "compile", "memory", "speed")
# A finding of one of these makes the exit non-zero; a target that is missed does as well, as in
# ``python -m benchmarks --targets``.
FAILED = "failed"
MISSED = "missed"
# "ok" and "met" are good, "told" is held against nothing, "skipped" was not looked at.
STATUSES = ("ok", FAILED, "met", MISSED, "told", "skipped")


@dataclass(frozen=True)
class Place:
    """Where the tasks run, and at what size."""

    device: str = "cuda"
    backend: str = "triton"
    # The sizes of races are divided by this, and checks take a few tiny shapes where it isn't 1.
    scale: int = 1

    @property
    def tiny(self) -> bool:
        return self.scale > 1

    @property
    def served(self) -> str | None:
        """What a race passes as ``backend``: on a card None, and the dispatcher chooses."""
        return None if self.device == "cuda" else self.backend

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free_bytes(self) -> float:
        """What is left on the card, without what this process's allocator only keeps."""
        if self.device != "cuda":
            return float("inf")
        gc.collect()
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    group: str
    name: str
    status: str
    detail: str
    values: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        loud = self.status.upper() if self.status in {FAILED, MISSED} else self.status
        return f"{loud:<8}{self.group:<12}{self.name:<58}  {self.detail}"


@dataclass(frozen=True)
class Task:
    """What one process does in one go."""

    group: str
    name: str
    run: Callable[[Place], list[Finding]]
    bytes: int = 0  # of the card's memory; a smaller card skips the task
    seconds: float = 240.0  # after which it is taken for hung

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"


def said(error: BaseException) -> str:
    """The error's last words in one line, and where it was raised."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({where[-1].filename.rpartition('/')[2]}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {lines[0] if lines else ''}{place}"


def attempt(group: str, name: str, check: Callable[[], str]) -> Finding:
    """Run a check that returns what to tell, and raises ``AssertionError`` or anything else."""
    try:
        return Finding(group, name, "ok", check())
    except Exception as error:
        return Finding(group, name, FAILED, said(error))


def healthy(place: Place) -> bool:
    """Whether the card still answers: after an illegal access no launch of this process does."""
    try:
        place.synchronize()
    except RuntimeError:
        return False
    return True


def perform(task: Task, place: Place) -> list[Finding]:
    """The task's findings; what it raises is one."""
    if task.bytes and task.bytes > place.free_bytes():
        needed = f"needs {task.bytes / 2**30:.0f} GiB of the card's memory"
        return [Finding(task.group, task.name, "skipped", needed)]
    try:
        return task.run(place)
    except Exception as error:
        return [Finding(task.group, task.name, FAILED, said(error))]
