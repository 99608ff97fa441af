"""One row of choice.py: its call, fused and by strips taking turns, at one size after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks import timing
from benchmarks.gpu.compare import RELATIVE
from benchmarks.gpu.findings import said
from benchmarks.tune.rows import in_place, off_by
from ssl_fast.backends.triton.choice import EVERY_SIZE, NO_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.tune.calls import Call
    from benchmarks.tune.rows import Clock, Key
    from ssl_fast.backends.triton.choice import Choice

# Queries and keys: from launches that cost more than the work to seconds of products.
BATCHES = tuple(2**e for e in range(8, 17))
SECONDS = 0.1
WAYS = {"fused": EVERY_SIZE, "strips": NO_SIZE}


class WrongRowError(RuntimeError):
    """The call reads another row, or its two ways give two results."""


@dataclass
class Crossing:
    """What a row's measurement found."""

    most_pairs: int
    # Seconds fused and by strips for each batch, or why there are none.
    times: dict[int, tuple[float, float] | str]


class ChoiceRow:
    """A row of the table and the calls that read it, one for each batch."""

    def __init__(
        self,
        key: Key,
        call_for: Callable[[int], Call],
        clock: Clock,
        synchronize: Callable[[], None],
        batches: Sequence[int] = BATCHES,
    ) -> None:
        self.key, self.call_for, self.clock = key, call_for, clock
        self.synchronize, self.batches = synchronize, batches

    def crossing(self) -> Crossing:
        """Up to how many pairs the sums are best fused."""
        times = {batch: self.measure(batch) for batch in self.batches}
        measured = {batch: found for batch, found in times.items() if not isinstance(found, str)}
        if not measured:
            raise WrongRowError(f"no batch could be measured: {times}")
        return Crossing(most_pairs(measured), times)

    def measure(self, batch: int) -> tuple[float, float] | str:
        """Seconds fused and by strips, or that it does not fit."""
        try:
            return self._times(batch)
        except torch.cuda.OutOfMemoryError as error:
            return said(error)

    def _times(self, batch: int) -> tuple[float, float]:
        call = self.call_for(batch)

        def run(way: Choice) -> Sequence[torch.Tensor]:
            with in_place(self.key, way) as table:
                found = call()
            if self.key not in table.read:
                raise WrongRowError("its call does not read it")
            return found

        calls = {name: partial(run, way) for name, way in WAYS.items()}
        # Checked first: a speed of another result is none.
        results = [[x.detach() for x in run()] for run in calls.values()]
        self.synchronize()
        for i, (fused, strips) in enumerate(zip(*results, strict=True)):
            off = off_by(fused, strips)
            if not off <= RELATIVE[getattr(torch, self.key[1])]:
                raise WrongRowError(f"WRONG: result {i} of {batch} rows is off by {off:.1e}")
        del results
        rounds = timing.rounds_for(self.clock(calls["fused"]), budget=SECONDS, least=5, most=50)
        taken = timing.alternate(calls, rounds, self.clock)
        return taken["fused"].median, taken["strips"].median


def most_pairs(times: Mapping[int, tuple[float, float]]) -> int:
    """The cut that loses least: fused up to it, by strips beyond.

    A size near the crossing may go either way by the clock's noise, so it isn't the first that
    strips win but the least sum of the logarithms of what is lost. Between two sizes the cut is
    their product, the geometric mean of their pairs.
    """
    sizes = sorted(times)
    gains = [math.log(times[size][1] / times[size][0]) for size in sizes]
    # Fusing the first `cut` sizes gains this against strips everywhere.
    best = max(range(len(sizes) + 1), key=lambda cut: sum(gains[:cut]))
    if best == len(sizes):
        return EVERY_SIZE.most_pairs
    if best == 0:
        return NO_SIZE.most_pairs
    return sizes[best - 1] * sizes[best]
