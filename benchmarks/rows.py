"""One row of the table: checked against the right answer, then timed in turns with eager torch."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import agreement, machine, memory, timing
from benchmarks.ceilings import share_of
from benchmarks.conftest import GRIDS, Recorder
from benchmarks.sides import Outcome, Side, Step, baseline_of, sides_of

if TYPE_CHECKING:
    from benchmarks.cases import Case

SECONDS_PER_ROW = 1.5
LONG_SECONDS = 5.0


def parametrize(metafunc, op: str) -> None:
    """The rows of an op's workloads: every case with each of its sides."""
    option = metafunc.config.getoption
    grid = option("--grid")
    pairs = [
        pytest.param(case, side, id=f"{case.label} {side.name}".replace(" ", "-"))
        for case in GRIDS[grid](option("--device"))
        if case.op == op
        for side in sides_of(case, full=grid != "default")
    ]
    metafunc.parametrize(("case", "side"), pairs)


def row(benchmark, recorder: Recorder, case: Case, side: Side) -> None:
    """Measure a row, and keep it or why there is none."""
    benchmark.group = case.label
    recorder.enter(case)
    late = "the run's time is spent" if time.monotonic() > recorder.deadline else None
    reason = late or memory.too_large(case, side) or side.refuses(case)
    if reason is not None:
        recorder.add(case, side, "skipped", reason)
        pytest.skip(reason)
    try:
        values = _measure(benchmark, case, side)
    except _DisagreedError as error:
        recorder.add(case, side, "disagreed", str(error))
        pytest.fail(f"{case.label}: {side.name}: {error}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        recorder.add(case, side, "failed", reason)
        # A peer may lack something here (torch.compile a compiler); that of ours is a failure.
        if side.backend is not None:
            raise
        pytest.skip(reason)
    values["ceiling"], values["share"] = share_of(
        case.device, case.dtype, values["gflops"], recorder.ceilings
    )
    benchmark.extra_info.update(values, dtype=case.dtype, shape=[case.rows, case.columns, case.dim])
    stats = benchmark.stats.stats
    recorder.add(
        case, side, "ok", seconds=stats.median, fastest=stats.min, spread=stats.iqr,
        rounds=stats.rounds, **values,
    )  # fmt: skip


class _DisagreedError(Exception):
    """A result is not the reference's."""


def _measure(benchmark, case: Case, side: Side) -> dict[str, Any]:
    """Check the side's result, then let ``benchmark`` time it; the row's other values."""
    step = side.step(case)
    seconds, outcome = _first_runs(step)
    errors = agreement.compare(case, outcome, side.grad_output)
    del outcome
    complaint = agreement.complaint(case, errors)
    if complaint is not None:
        raise _DisagreedError(complaint)
    baseline = _Baseline(case, side)
    rounds = timing.rounds_for(seconds + baseline.estimate, budget=SECONDS_PER_ROW)
    benchmark.pedantic(step, setup=baseline.take_turn, rounds=rounds, iterations=1)
    median = benchmark.stats.stats.median
    extra = memory.peak_extra_bytes(case, side)
    return {
        "isa": machine.describe(case.device)["isa"],
        "threads": torch.get_num_threads(),
        "gflops": case.flops / median / 1e9,
        "ratio": baseline.ratio(median),
        "extra_mib": None if extra is None else extra / 2**20,
        "loss_error": errors.loss,
        "gradient_error": errors.gradient,
    }


def _first_runs(step: Step) -> tuple[float, Outcome]:
    """Seconds of a step that is warm, unless it is so long that warming makes no difference."""
    start = time.perf_counter()
    outcome = step()
    seconds = time.perf_counter() - start
    # The first run of a compiled step is long for another reason, and short when run again.
    if seconds < LONG_SECONDS or timing.once(step) < 0.8 * seconds:
        seconds = timing.once(step)
    return seconds, outcome


class _Baseline:
    """Eager torch, run before every round of another side: the two take turns."""

    def __init__(self, case: Case, side: Side) -> None:
        eager = baseline_of(case)
        self.is_side = side is eager
        self.step: Step | None = None
        self.seconds: list[float] = []
        self.estimate = 0.0
        if not self.is_side and memory.too_large(case, eager) is None:
            self.step = eager.step(case)
            self.estimate = timing.once(self.step)
            if self.estimate < SECONDS_PER_ROW:  # a longer one is as good as warm
                self.estimate = timing.once(self.step)

    def take_turn(self) -> None:
        if self.step is not None:
            self.seconds.append(timing.once(self.step))

    def ratio(self, median: float) -> float | None:
        """How many times faster the side was than eager torch in the same rounds."""
        if self.is_side:
            return 1.0
        return statistics.median(self.seconds) / median if self.seconds else None
