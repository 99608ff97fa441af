"""Clocks: how many rounds a call deserves, and two or more calls taking turns."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Times:
    """Seconds of one side, round by round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half of the middle half's width, as a part of the median."""
        if len(self.rounds) < 4:
            return (max(self.rounds) - min(self.rounds)) / (2 * self.median)
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return (high - low) / (2 * self.median)


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds_for(seconds: float, *, budget: float, least: int = 3, most: int = 200) -> int:
    """Rounds of a call that takes ``seconds``, to fill ``budget``; long calls get fewer."""
    if seconds > budget:
        return 1 if seconds > 4 * budget else 2
    return max(least, min(most, int(budget / max(seconds, 1e-6))))


def alternate(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object]], float] = once,
) -> dict[str, Times]:
    """Time calls that take turns within every round, so that a busy moment hits them all.

    Each call has one round to warm up that is not counted. ``clock`` gives a call's seconds.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        # The order turns too: whoever comes second finds the other's data in the cache.
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(clock(calls[name]))
    return {name: Times(tuple(values)) for name, values in seconds.items()}
