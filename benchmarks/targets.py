"""What a release must reach: each ratio from one run in which the sides take turns.

``python -m benchmarks --targets`` prints every figure beside its goal and writes targets.json.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from benchmarks import agreement, machine, memory, timing
from benchmarks.cases import Case
from benchmarks.ceilings import fma_peak
from benchmarks.sides import COMPILED, EAGER, NATIVE, ONE_SIDED, Side, Step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PEAK = "FMA peak"
PEAK_SECONDS = 0.25
SECONDS_PER_GROUP = 18.0
MOST_ROUNDS = 15
BUSY_SPREAD = 0.1


@dataclass(frozen=True)
class Figure:
    """One line: a measured value and the goal it is held against."""

    case: str
    what: str
    value: float | None  # None: not measured, and ``detail`` says why
    goal: float
    at_least: bool
    unit: str
    detail: str
    # Half of the middle half of the rounds' seconds, as a part of the median; the worst side's.
    spread: float | None = None

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        value = "-" if self.value is None else f"{self.value:.2f}{self.unit}"
        if self.unit in ("%", " MiB") and self.value is not None:
            value = f"{self.value:.1f}{self.unit}"
        verdict = "met" if self.met else "MISSED"
        goal = f"{sign} {self.goal:g}{self.unit}"
        return f"{verdict:<7}{value:>10} {goal:>11}  {self.what:<34}{self.case:<42}{self.detail}"


def main(folder: Path, scale: int = 1) -> int:
    """Measure all targets; 0 if all are met. ``scale`` divides the sizes (for tests)."""
    print(machine.sentence(machine.describe()), flush=True)
    figures = []
    for measure in (_plain, _forward_only, _bf16, _small, _large, _nt_xent):
        for figure in measure(scale):
            print(figure.line(), flush=True)
            figures.append(figure)
    document = {
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d"),
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "targets.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    missed = sum(not figure.met for figure in figures)
    print(f"{len(figures) - missed} of {len(figures)} met; wrote {path}")
    noisy = [figure for figure in figures if figure.spread and figure.spread > BUSY_SPREAD]
    if noisy:
        print(
            f"{len(noisy)} figures come from rounds that differ by over {100 * BUSY_SPREAD:.0f}%: "
            "the machine was busy with something else, measure again"
        )
    return 1 if missed else 0


def _plain(scale: int) -> list[Figure]:
    case = Case("info_nce", 8192 // scale, 128, normalize=False)
    group = _Group(case, (NATIVE, EAGER, COMPILED), peak=True)
    return [group.ratio(EAGER, 3.0), group.ratio(COMPILED, 1.8), group.share(78.0)]


def _forward_only(scale: int) -> list[Figure]:
    case = Case("info_nce", 8192 // scale, 128, gradient=False, normalize=False)
    return [_Group(case, (NATIVE,), peak=True).share(85.0)]


def _bf16(scale: int) -> list[Figure]:
    case = Case("info_nce", 8192 // scale, 128, "bf16", normalize=False)
    group = _Group(case, (NATIVE, EAGER, COMPILED))
    return [group.ratio(EAGER, 3.0), group.ratio(COMPILED, 1.6)]


def _small(scale: int) -> list[Figure]:
    case = Case("info_nce", 256 // min(scale, 4), 128, normalize=False)
    return [_Group(case, (NATIVE, EAGER), most_rounds=2000).ratio(EAGER, 1.0)]


def _large(scale: int) -> list[Figure]:
    case = Case("info_nce", 65536 // scale, 128, normalize=False)
    eager = EAGER.bytes_needed(case) / 2**30
    detail = f"eager would need {eager:.0f} GiB for three dense matrices"
    reason = NATIVE.refuses(case)
    extra = None if reason else memory.peak_extra_bytes(case, NATIVE)
    if extra is None:
        detail = reason or "the system shows no high-water mark"
    value = None if extra is None else extra / 2**20
    what = "extra memory"
    return [Figure(case.label, what, value, 128.0, at_least=False, unit=" MiB", detail=detail)]


def _nt_xent(scale: int) -> list[Figure]:
    group = _Group(Case("nt_xent", 8192 // scale, 128), (NATIVE, EAGER, ONE_SIDED))
    return [group.ratio(EAGER, 5.0), group.ratio(ONE_SIDED, 1.25)]


class _Group:
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
            detail = f"{_told(theirs)} against {_told(ours)}, {len(ours.rounds)} rounds"
        return self._figure(f"against {other.name}", value, goal, "x", detail, spread)

    def share(self, goal: float) -> Figure:
        """The native side's part of the FMA peak, measured in the same rounds."""
        value, spread, detail = None, None, self._why(NATIVE.name)
        if detail is None and not self.peaks:
            detail = "no FMA peak without native kernels"
        if detail is None:
            # The highest of the samples: a busy moment lowers a peak, and would flatter the share.
            ours, peak = self.times[NATIVE.name], max(self.peaks)
            gflops = self.case.flops / ours.median / 1e9
            value, spread = 100 * gflops / peak, ours.spread
            detail = f"{gflops:.0f} of {peak:.0f} GFLOP/s, {_told(ours)}"
        return self._figure("of the FMA peak", value, goal, "%", detail, spread)

    def _figure(
        self,
        what: str,
        value: float | None,
        goal: float,
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


def _checked(case: Case, side: Side) -> tuple[Step | None, str]:
    """The side's step once its result agreed with the reference, or None and why not."""
    reason = memory.too_large(case, side) or side.refuses(case)
    if reason is not None:
        return None, reason
    step = side.step(case)
    errors = agreement.compare(case, step(), side.grad_output)
    complaint = agreement.complaint(case, errors)
    return (step, "") if complaint is None else (None, complaint)


def _told(times: timing.Times) -> str:
    return f"{times.median * 1e3:.4g} ms (+-{100 * times.spread:.0f}%)"
