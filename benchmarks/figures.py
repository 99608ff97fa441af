"""Measured values held against goals: ratios from one run in which the sides take turns, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import agreement, memory, timing
from benchmarks.ceilings import fma_peak
from benchmarks.sides import NATIVE, Side, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.cases import Case

PEAK = "FMA peak"
PEAK_SECONDS = 0.25
SECONDS_PER_GROUP = 18.0
MOST_ROUNDS = 15
NO_MARK = "the system shows no high-water mark"
FORMATS = {"x": ".2f", "%": ".1f", " MiB": ".1f", "": ".1e"}  # of a value, by its unit


@dataclass(frozen=True)
class Figure:
    """One line: a measured value and the goal it is held against."""

    case: str
    what: str
    value: float | None  # None: not measured, and ``detail`` says why
    goal: float | None  # None: told, and held against nothing
    at_least: bool
    unit: str
    detail: str
    # Half of the middle half of the rounds' seconds, as a part of the median; the worst side's.
    spread: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        if self.value is None:
            return False
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def line(self) -> str:
        verdict = {True: "met", False: "MISSED", None: "told"}[self.met]
        value = "-" if self.value is None else f"{self.value:{FORMATS[self.unit]}}{self.unit}"
        sign = ">=" if self.at_least else "<="
        goal = "" if self.goal is None else f"{sign} {self.goal:g}{self.unit}"
        return f"{verdict:<7}{value:>10} {goal:>11}  {self.what:<49}{self.case:<52}{self.detail}"


class Group:
    """The sides of one case, checked and timed taking turns."""

    def __init__(
        self,
        case: Case,
        sides: tuple[Side, ...],
        *,
        peak: bool = False,
        most_rounds: int = MOST_ROUNDS,
    ) -> None:
        self.case = case
        self.refused: dict[str, str] = {}
        calls: dict[str, Callable[[], object]] = {}
        for side in sides:
            step, reason = _checked(case, side)
            if step is not None:
                calls[side.name] = step
            else:
                self.refused[side.name] = reason
        self.peaks: list[float] = []
        if peak:
            calls[PEAK] = self._sample_peak
        # Warm, so that the estimate of a round holds.
        seconds = sum(timing.once(call) for call in calls.values())
        self.peaks.clear()
        rounds = timing.rounds_for(seconds, budget=SECONDS_PER_GROUP, least=5, most=most_rounds)
        self.times = timing.alternate(calls, rounds)

    def _sample_peak(self) -> None:
        found = fma_peak(self.case.dtype, PEAK_SECONDS)
        if found is not None:
            self.peaks.append(found)

    def ratio(self, other: Side, goal: float) -> Figure:
        """How many times faster the native side is than another."""
        value, spread, detail = None, None, self._why(NATIVE.name, other.name)
        if detail is None:
            ours, theirs = self.times[NATIVE.name], self.times[other.name]
            value, spread = theirs.median / ours.median, max(ours.spread, theirs.spread)
            detail = f"{told(theirs)} against {told(ours)}, {len(ours.rounds)} rounds"
        return self._figure(f"against {other.name}", value, goal, "x", detail, spread)

    def share(self, goal: float | None) -> Figure:
        """The native side's part of the FMA peak, measured in the same rounds."""
        value, spread, detail = None, None, self._why(NATIVE.name)
        if detail is None and not self.peaks:
            detail = "no FMA peak without native kernels"
        if detail is None:
            # The highest of the samples: a busy moment lowers a peak, and would flatter the share.
            ours, peak = self.times[NATIVE.name], max(self.peaks)
            gflops = self.case.flops / ours.median / 1e9
            value, spread = 100 * gflops / peak, ours.spread
            detail = f"{gflops:.0f} of {peak:.0f} GFLOP/s, {told(ours)}"
        return self._figure("of the FMA peak", value, goal, "%", detail, spread)

    def _figure(
        self,
        what: str,
        value: float | None,
        goal: float | None,
        unit: str,
        detail: str,
        spread: float | None,
    ) -> Figure:
        return Figure(
            self.case.label, what, value, goal, at_least=True, unit=unit, detail=detail,
            spread=spread,
        )  # fmt: skip

    def _why(self, *names: str) -> str | None:
        reasons = [f"{name}: {self.refused[name]}" for name in names if name in self.refused]
        return "; ".join(reasons) or None


def less_memory(case: Case, other: Side, goal: float) -> Figure:
    """How many times less extra memory than another's the native side takes."""
    value, detail = None, _memory_reason(case, NATIVE) or _memory_reason(case, other)
    if detail is None:
        ours, theirs = (memory.peak_extra_bytes(case, side) for side in (NATIVE, other))
        if ours is None or theirs is None:
            detail = NO_MARK
        else:
            # A page at least: what takes nothing has no ratio.
            value = theirs / max(ours, 4096)
            detail = f"{theirs / 2**20:.4g} against {ours / 2**20:.3g} MiB"
    what = f"less memory than {other.name}"
    return Figure(case.label, what, value, goal, at_least=True, unit="x", detail=detail)


def extra_memory(case: Case, goal: float, detail: str) -> Figure:
    """The native side's extra memory in MiB."""
    reason = NATIVE.refuses(case)
    extra = None if reason else memory.peak_extra_bytes(case, NATIVE)
    if extra is None:
        detail = reason or NO_MARK
    value = None if extra is None else extra / 2**20
    return Figure(
        case.label, "extra memory", value, goal, at_least=False, unit=" MiB", detail=detail
    )


def _memory_reason(case: Case, side: Side) -> str | None:
    reason = memory.too_large(case, side) or side.refuses(case)
    return None if reason is None else f"{side.name}: {reason}"


def _checked(case: Case, side: Side) -> tuple[Step | None, str]:
    """The side's step once its result agreed with the reference, or None and why not."""
    reason = memory.too_large(case, side) or side.refuses(case)
    if reason is not None:
        return None, reason
    step = side.step(case)
    errors = agreement.compare(case, step(), side.grad_output)
    complaint = agreement.complaint(case, errors)
    return (step, "") if complaint is None else (None, complaint)


def told(times: timing.Times) -> str:
    """A median and its spread in words."""
    return f"{times.median * 1e3:.4g} ms (+-{100 * times.spread:.0f}%)"


def ratio(
    label: str, what: str, goal: float | None, times: dict[str, timing.Times], wrong: str | None,
    our_name: str, other: str,
) -> Figure:  # fmt: skip
    """How many times faster ours is than another; ``wrong`` says what is amiss with the other."""
    value = spread = None
    detail = wrong or memory.NOT_KEPT
    if wrong is None and other in times:
        mine, theirs = times[our_name], times[other]
        value, spread = theirs.median / mine.median, max(mine.spread, theirs.spread)
        detail = f"{told(theirs)} against {told(mine)}, {len(mine.rounds)} rounds"
    return Figure(label, what, value, goal, at_least=True, unit="x", detail=detail, spread=spread)
