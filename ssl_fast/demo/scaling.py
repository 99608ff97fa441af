"""Time and memory of one loss step against the batch size, on synthetic embeddings."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import ssl_fast
from ssl_fast.demo import memory
from ssl_fast.demo.plain import plain_bytes, plain_nt_xent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

DIM = 128
TEMPERATURE = 0.2
ROUNDS = 3
OURS, PLAIN = "ssl_fast", "plain torch"
SIDES = (OURS, PLAIN)


@dataclass
class Point:
    """One batch size: what each side took, or why it was not run."""

    batch: int  # images; the loss sees twice as many rows
    seconds: dict[str, float] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def loss_of(side: str, z0: Tensor, z1: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The same NT-Xent loss from either side."""
    if side == PLAIN:
        return plain_nt_xent(z0, z1, temperature)
    loss: Tensor = ssl_fast.nt_xent(z0, z1, temperature)
    return loss


def synthetic_views(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two correlated views [batch, DIM] that ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, DIM, generator=generator)
    z1 = z0 + torch.randn(batch, DIM, generator=generator)
    return z0.requires_grad_(), z1.requires_grad_()


def gradient_step(side: str, batch: int) -> Callable[[], tuple[Tensor, ...]]:
    """A call that takes the loss and its gradient once, on inputs made beforehand."""
    z0, z1 = synthetic_views(batch)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(side, z0, z1), (z0, z1))

    return step


def memory_job(side: str, batch: int) -> Callable[[], object]:
    """For the child process: the step, after a small one has loaded what loads on first use."""
    gradient_step(side, 16)()
    return gradient_step(side, batch)


def measure(batches: Sequence[int], *, seconds: float) -> Iterator[Point]:
    """Measure both sides at each batch size in turn, within about ``seconds`` in all.

    A side whose memory would pass half of what the machine can give, or whose time (four times
    that of half the batch) would pass what is left, is skipped with its reason.
    """
    deadline = time.monotonic() + seconds
    points: list[Point] = []
    for batch in batches:
        point = Point(batch)
        points.append(point)
        steps = {}
        left = deadline - time.monotonic()
        for side in SIDES:
            foretold = _foretell(side, points)
            # The rounds, the warm-up and the memory's child.
            needed = foretold * (ROUNDS + 2)
            if reason := _too_large(side, batch):
                point.skipped[side] = reason
            elif needed > left:
                point.skipped[side] = f"would take {foretold:.0f} s a step, too long for the demo"
            else:
                left -= needed
                steps[side] = gradient_step(side, batch)
        point.seconds = alternate(steps, ROUNDS)
        for side in steps:
            extra = memory.peak_extra_bytes(memory_job, side, batch)
            if extra is not None:
                point.extra_bytes[side] = extra
        yield point


def alternate(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each step, taking turns so that a busy moment hits every side."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(rounds):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            times[side].append(time.perf_counter() - start)
    return {side: statistics.median(values) for side, values in times.items()}


def _too_large(side: str, batch: int) -> str | None:
    if side != PLAIN:
        return None
    needed, available = plain_bytes(2 * batch, itemsize=4), memory.available_bytes()
    if available is None or needed <= available // 2:
        return None
    return f"would need {needed / 2**30:.0f} GiB, over half of what is free"


def _foretell(side: str, points: list[Point]) -> float:
    """Seconds that a step at the last point's batch will take: they grow with its square."""
    before = next((p for p in reversed(points) if side in p.seconds), None)
    if before is None:
        return 0.0
    return before.seconds[side] * (points[-1].batch / before.batch) ** 2
