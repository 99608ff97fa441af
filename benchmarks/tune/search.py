"""From a row of the table to its fastest neighbour, one field changed at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ssl_fast.backends.triton.tuning import Config

# A tile's sides; tl.dot takes no fewer than 16, and wgmma wants 64 rows.
ROWS = (32, 64, 128, 256)
COLUMNS = (32, 64, 128, 256)
DEPTHS = (32, 64, 128, 256)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4, 5)
# What is gained by less is the clock's noise.
GAIN = 0.99
# Steps from the present row; each is made for a gain, and few are.
MOST_STEPS = 6

# Seconds of a configuration, or why it has none.
Measure = Callable[[Config], "float | str"]


@dataclass
class Outcome:
    """A row's search."""

    best: Config
    seconds: float
    before: float  # of the present row
    tried: dict[tuple[int, ...], float | str] = field(default_factory=dict)

    @property
    def refused(self) -> dict[tuple[int, ...], str]:
        """The configurations that were not timed, and why."""
        return {tile: why for tile, why in self.tried.items() if isinstance(why, str)}


class PresentRowError(RuntimeError):
    """The present row itself does not run: there is nothing to compare with."""


def tile(config: Config) -> tuple[int, ...]:
    """What makes two rows the same kernel."""
    return (
        config.block_rows, config.block_columns, config.block_depth, config.warps, config.stages
    )  # fmt: skip


def neighbours(config: Config, *, resident: bool) -> list[Config]:
    """Rows that differ in one field by one step; resident: the depth stays, it is the bucket's."""
    found = []
    fields = {"block_rows": ROWS, "block_columns": COLUMNS, "warps": WARPS, "stages": STAGES}
    if not resident:
        fields["block_depth"] = DEPTHS
    for name, values in fields.items():
        present = getattr(config, name)
        lower = [value for value in values if value < present]
        higher = [value for value in values if value > present]
        found += [replace(config, **{name: value}) for value in lower[-1:] + higher[:1]]
    # One side for the other, which no single step reaches.
    if config.block_rows != config.block_columns:
        found.append(
            replace(config, block_rows=config.block_columns, block_columns=config.block_rows)
        )
    return found


def shared_bytes(config: Config, itemsize: int, *, resident: bool) -> int:
    """What the operands of the tile hold on chip at least; the compiler may need more."""
    keys = config.block_columns * config.block_depth * max(1, config.stages - 1)
    queries = config.block_rows * config.block_depth
    if not resident:
        queries *= max(1, config.stages - 1)
    return (keys + queries) * itemsize


def search(
    start: Config, measure: Measure, candidates: Callable[[Config], list[Config]]
) -> Outcome:
    """Go to the fastest neighbour while there is a faster one."""
    before = measure(start)
    if isinstance(before, str):
        raise PresentRowError(before)
    outcome = Outcome(start, before, before, {tile(start): before})
    for _ in range(MOST_STEPS):
        here = outcome.best
        for candidate in candidates(here):
            if tile(candidate) in outcome.tried:
                continue
            seconds = outcome.tried[tile(candidate)] = measure(candidate)
            if not isinstance(seconds, str) and seconds < GAIN * outcome.seconds:
                outcome.best, outcome.seconds = candidate, seconds
        if outcome.best is here:
            break
    return outcome
