"""Speed: sides that take turns within one run, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import memory, timing
from benchmarks.gpu import peers
from benchmarks.gpu.findings import FAILED, MISSED, Finding, Place, Task, said

OURS, EAGER, COMPILED = "ssl_fast", "eager torch", "torch.compile"
MATRIX_PEAK, COPY = "matrix peak", "copy"
PEAK_SIZE, COPY_BYTES = 8192, 2**30
SECONDS = 2.0
MOST_ROUNDS = 40
Step = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Side:
    """One way to do the work; ``build`` makes its step from the race's inputs."""

    name: str
    build: Callable[[Any], Step]
    peer: bool = False  # a package of ``peers``


class Goal(NamedTuple):
    """What a measured value is held against."""

    what: str
    value: Callable[[Measured], float | None]
    bound: float
    at_least: bool
    unit: str


@dataclass(frozen=True)
class Race:
    """One workload at one size."""

    name: str
    inputs: Callable[[Place], Any]
    sides: tuple[Side, ...]  # ours first
    goals: tuple[Goal, ...]
    # How far a side's results are from ours, of both results and the inputs.
    compare: Callable[[Any, Any, Any], float]
    same: float
    flops: Callable[[Place], float] | None = None
    moved: Callable[[Place], float] | None = None  # bytes
    calls: int = 1  # in a round: short ones are timed many at a time
    bytes: int = 8 * 2**30


@dataclass
class Measured:
    """What the sides' turns gave."""

    times: dict[str, timing.Times]
    extra: dict[str, int]  # bytes beyond the inputs
    flops: float | None
    moved: float | None
    ceilings: dict[str, float] = field(default_factory=dict)  # FLOP/s and bytes/s

    def seconds(self, name: str) -> float | None:
        return self.times[name].median if name in self.times else None

    def ratio(self, other: str) -> float | None:
        """How many times faster ours is."""
        ours, theirs = self.seconds(OURS), self.seconds(other)
        return None if ours is None or theirs is None else theirs / ours


def faster_than(other: str, bound: float) -> Goal:
    return Goal(f"against {other}", lambda found: found.ratio(other), bound, True, "x")


def _share(ceiling: str, work: str, what: str, bound: float) -> Goal:
    """Of a ceiling's rate, in percent; ``work`` is what of ``Measured`` counts the work."""

    def value(found: Measured) -> float | None:
        ours, rate, done = found.seconds(OURS), found.ceilings.get(ceiling), getattr(found, work)
        if ours is None or rate is None or done is None:
            return None
        return 100 * float(done) / ours / rate

    return Goal(what, value, bound, True, "%")


def share_of_peak(bound: float) -> Goal:
    return _share(MATRIX_PEAK, "flops", "of the matrix peak", bound)


def share_of_copy(bound: float) -> Goal:
    return _share(COPY, "moved", "of the copy bandwidth", bound)


def times_as_long(other: str, bound: float) -> Goal:
    def value(found: Measured) -> float | None:
        ratio = found.ratio(other)
        return None if ratio is None else 1 / ratio

    return Goal(f"times as long as {other}", value, bound, False, "x")


def extra_gib(bound: float) -> Goal:
    def value(found: Measured) -> float | None:
        return found.extra[OURS] / 2**30 if OURS in found.extra else None

    return Goal("extra memory", value, bound, False, " GiB")


def part_of_memory(other: str, bound: float) -> Goal:
    def value(found: Measured) -> float | None:
        if OURS not in found.extra or not found.extra.get(other):
            return None
        return found.extra[OURS] / found.extra[other]

    return Goal(f"extra memory, of {other}'s", value, bound, False, "x")


def clock(place: Place) -> Callable[[Callable[[], object]], float]:
    """Seconds of a call: on a card those between two events around it."""
    if place.device != "cuda":
        return timing.once

    def seconds(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return seconds


def ceiling_steps(place: Place, names: Sequence[str]) -> dict[str, tuple[Step, float]]:
    """A large product in bf16 and a copy: each with the work that it does."""
    steps: dict[str, tuple[Step, float]] = {}
    if MATRIX_PEAK in names:
        size = max(16, PEAK_SIZE // place.scale)
        left, right = (
            torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2)
        )
        steps[MATRIX_PEAK] = (lambda: (torch.mm(left, right),), 2.0 * size**3)
    if COPY in names:
        source = torch.zeros(COPY_BYTES // 4 // place.scale, device=place.device)
        target = torch.empty_like(source)
        steps[COPY] = (lambda: (target.copy_(source),), 2.0 * source.nbytes)
    return steps


def relative(ours: Sequence[Tensor], other: Sequence[Tensor], _: Any) -> float:
    """The worst result's relative difference in the 2-norm; a NaN stays one."""
    errors = [
        (a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-300)
        for a, b in zip(ours, other, strict=True)
    ]
    return float(torch.stack(errors).max())


def run(race: Race, place: Place) -> list[Finding]:
    """Check the sides, time them in turns, hold ours against the goals."""
    findings: list[Finding] = []
    inputs = race.inputs(place)
    steps: dict[str, Step] = {}
    extra: dict[str, int] = {}
    expected: Any = None
    for side in race.sides:
        if side.peer and not peers.installed(side.name):
            findings.append(_told(race, side.name, "not installed"))
            continue
        try:
            step = side.build(inputs)
            found = step()
            place.synchronize()
            if expected is None:
                expected = found
            off = race.compare(expected, found, inputs)
            del found
        except Exception as error:
            if side.name == OURS:
                raise
            # A peer may lack something here; that is its own affair.
            findings.append(_told(race, side.name, f"raised {said(error)}"))
            continue
        if not off <= race.same:
            told = f"differs from ours by {off:.1e}, allowed {race.same:.0e}"
            findings.append(Finding("speed", f"{race.name}, {side.name}", FAILED, told))
            continue
        steps[side.name] = step
        if place.device == "cuda":
            extra[side.name] = memory.cuda_peak(step)
    del expected
    return findings + judged(race, measure(race, place, steps, extra))


def measure(race: Race, place: Place, steps: dict[str, Step], extra: dict[str, int]) -> Measured:
    """The sides and the ceilings, taking turns."""
    wanted = {goal.what for goal in race.goals}
    names = [
        name
        for name, what in ((MATRIX_PEAK, "of the matrix peak"), (COPY, "of the copy bandwidth"))
        if what in wanted
    ]
    works = ceiling_steps(place, names)
    calls = {name: _repeated(step, race.calls) for name, step in steps.items()}
    calls |= {name: step for name, (step, _) in works.items()}
    seconds = clock(place)
    once = sum(seconds(call) for call in calls.values())
    rounds = timing.rounds_for(once, budget=SECONDS / place.scale, least=5, most=MOST_ROUNDS)
    times = timing.alternate(calls, rounds, seconds)
    ceilings = {name: work / min(times.pop(name).rounds) for name, (_, work) in works.items()}
    each = {
        name: timing.Times(tuple(x / race.calls for x in found.rounds))
        for name, found in times.items()
    }
    flops, moved = (None if work is None else work(place) for work in (race.flops, race.moved))
    return Measured(each, extra, flops, moved, ceilings)


def _repeated(step: Step, calls: int) -> Callable[[], object]:
    if calls == 1:
        return step

    def many() -> None:
        for _ in range(calls):
            step()

    return many


def judged(race: Race, found: Measured) -> list[Finding]:
    """The goals, each met, missed or not measured, and the sides' times."""
    values = {
        "seconds": {name: x.median for name, x in found.times.items()},
        "spread": {name: x.spread for name, x in found.times.items()},
        "extra_bytes": found.extra,
        "ceilings": found.ceilings,
    }
    told = ", ".join(f"{name} {1e3 * x.median:.3g} ms" for name, x in found.times.items())
    findings = [Finding("speed", race.name, "told", told, values)]
    for goal in race.goals:
        name = f"{race.name}, {goal.what}"
        sign = ">=" if goal.at_least else "<="
        held = {"goal": goal.bound, "at_least": goal.at_least, "unit": goal.unit}
        value = goal.value(found)
        if value is None:
            reason = f"not measured, goal {sign} {goal.bound:g}{goal.unit}"
            findings.append(Finding("speed", name, "skipped", reason, held))
            continue
        met = value >= goal.bound if goal.at_least else value <= goal.bound
        findings.append(
            Finding(
                "speed", name, "met" if met else MISSED,
                f"{value:.3g}{goal.unit} {sign} {goal.bound:g}{goal.unit}",
                held | {"value": value},
            )
        )  # fmt: skip
    return findings


def _told(race: Race, name: str, detail: str) -> Finding:
    return Finding("speed", f"{race.name}, {name}", "told", detail)


def task(race: Race) -> Task:
    return Task("speed", race.name, lambda place: run(race, place), bytes=race.bytes)
