"""One row of the table: its call with other configurations in the row's place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import timing
from benchmarks.gpu.compare import RELATIVE
from benchmarks.gpu.findings import said
from benchmarks.tune.search import (
    GAIN,
    Outcome,
    neighbours,
    search,
    shared_bytes,
    tile,
)
from ssl_fast.backends.triton import choice, tuning
from ssl_fast.backends.triton.measured import Key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ssl_fast.backends.triton.choice import Choice
    from ssl_fast.backends.triton.tuning import Config

Clock = Callable[[Callable[[], object]], float]
SECONDS = 0.1
# Of the best beside the present row, taking turns: a search picks what the clock flattered.
CONFIRMING = 15


class _Watched(dict[Key, Any]):
    """A table that knows which of its rows were read."""

    def __init__(self, table: dict[Key, Any]) -> None:
        super().__init__(table)
        self.read: set[Key] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self:
            self.read.add(key)
        return super().get(key, default)


@contextlib.contextmanager
def in_place(key: Key, row: Config | Choice) -> Iterator[_Watched]:
    """While it is open, the row's table has this one."""
    module: Any = choice if isinstance(row, choice.Choice) else tuning
    before = module.TABLE
    watched = _Watched({**before, key: row})
    module.TABLE = watched
    try:
        yield watched
    finally:
        module.TABLE = before


@contextlib.contextmanager
def launched() -> Iterator[list[Any]]:
    """The compiled kernels that are launched while it is open."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **kwargs))
        return kernels[-1]

    JITFunction.run = watched
    try:
        yield kernels
    finally:
        JITFunction.run = run


def spilled(kernels: Sequence[Any]) -> int:
    """The most registers that one of the kernels keeps in memory."""
    return max((int(getattr(kernel, "n_spills", 0) or 0) for kernel in kernels), default=0)


class Row:
    """A row and the call that reads it."""

    def __init__(
        self,
        key: Key,
        call: Callable[[], Sequence[Tensor]],
        clock: Clock,
        shared_limit: float,
        synchronize: Callable[[], None],
    ) -> None:
        self.key, self.call, self.clock = key, call, clock
        self.shared_limit, self.synchronize = shared_limit, synchronize
        self.dtype: torch.dtype = getattr(torch, key[1])
        self.resident = key[2] != tuning.ANY_DEPTH
        self.present = tuning.TABLE[key]
        self.expected: list[Tensor] | None = None
        self.spills = 0

    def tuned(self) -> Outcome:
        """The search's outcome, its best confirmed beside the present row."""
        outcome = search(self.present, self.measure, partial(neighbours, resident=self.resident))
        if tile(outcome.best) == tile(self.present):
            return outcome
        calls = {name: partial(self._run, config) for name, config in
                 (("before", self.present), ("best", outcome.best))}  # fmt: skip
        times = timing.alternate(calls, CONFIRMING, self.clock)
        outcome.before, outcome.seconds = times["before"].median, times["best"].median
        if outcome.seconds >= GAIN * outcome.before:
            outcome.best, outcome.seconds = self.present, outcome.before
        return outcome

    def _run(self, config: Config) -> Sequence[Tensor]:
        with in_place(self.key, config):
            return self.call()

    def measure(self, config: Config) -> float | str:
        """Seconds of the call with this configuration, or why it is out."""
        held = shared_bytes(config, self.dtype.itemsize, resident=self.resident)
        if self.expected is not None and held > self.shared_limit:
            return f"its operands take {held} bytes of {self.shared_limit:.0f} on chip"
        try:
            with in_place(self.key, config) as table, launched() as kernels:
                found = [x.detach() for x in self.call()]
                self.synchronize()
            reason = self._refused(found, spilled(kernels), table)
            if reason is not None:
                return reason
            call = partial(self._run, config)
            rounds = timing.rounds_for(self.clock(call), budget=SECONDS, least=5, most=50)
            return timing.alternate({"": call}, rounds, self.clock)[""].median
        except Exception as error:  # what a compiler raises is as various as compilers
            return said(error)

    def _refused(self, found: list[Tensor], spills: int, table: _Watched) -> str | None:
        if self.expected is None:
            if self.key not in table.read:
                return "its call does not read it"
            self.expected, self.spills = found, spills
            return None
        if spills > self.spills:
            return f"spills {spills} registers, the present row {self.spills}"
        for i, (x, e) in enumerate(zip(found, self.expected, strict=True)):
            off = off_by(x, e)
            if not off <= RELATIVE[self.dtype]:
                return f"WRONG: result {i} is off by {off:.1e}"
        return None


def off_by(found: Tensor, expected: Tensor) -> float:
    """The relative difference in the 2-norm; of labels, the part of them that differ."""
    if not expected.is_floating_point():
        return float((found != expected).double().mean())
    size = expected.double().norm().clamp(min=1e-300)
    return float((found.double() - expected.double()).norm() / size)
