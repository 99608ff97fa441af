"""Options of the benchmark session, and the rows that it leaves."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import cases, ceilings, machine

if TYPE_CHECKING:
    from benchmarks.cases import Case
    from benchmarks.sides import Side

PEAK_SECONDS = 0.1
GRIDS = {"default": cases.default_cases, "full": cases.full_cases, "smoke": cases.smoke_cases}


def pytest_addoption(parser):
    group = parser.getgroup("ssl_fast")
    group.addoption("--grid", choices=sorted(GRIDS), default="default", help="which cases run")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--budget", type=float, default=float("inf"), help="seconds in all")
    group.addoption("--rows-json", default=None, help="where the rows are written")


@dataclass
class Recorder:
    """Gathers the rows, prints each as it comes, and knows the session's limits."""

    device: str
    deadline: float
    ceilings: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    group: str = ""

    def enter(self, case: Case) -> None:
        """Announce a group's first row, and look at the peak again beside it."""
        if case.label == self.group:
            return
        self.group = case.label
        print(f"\n{case.label}", flush=True)
        if self.device == "cpu":
            ceilings.raise_peak(self.ceilings, case.dtype, PEAK_SECONDS)

    def add(self, case: Case, side: Side, status: str, reason: str = "", **values: Any) -> None:
        """Keep a row: measured ("ok"), "skipped", "failed", or one whose result "disagreed"."""
        seconds = values.get("seconds")
        told = reason if seconds is None else f"{seconds * 1e3:10.2f} ms"
        if status not in ("ok", "skipped"):
            told = f"{status.upper()}: {told}"
        print(f"  {side.name:<34}{told}", flush=True)
        self.rows.append(
            {
                "group": case.label,
                "workload": case.workload,
                "op": case.op,
                "rows": case.rows,
                "columns": case.columns,
                "dim": case.dim,
                "dtype": case.dtype,
                "pass": case.mode,
                "side": side.name,
                "status": status,
                "reason": reason,
                **values,
            }
        )

    def document(self) -> dict[str, Any]:
        """Everything for the report; shares are of the highest peak that the session saw."""
        for row in self.rows:
            if row["status"] == "ok":
                row["ceiling"], row["share"] = ceilings.share_of(
                    self.device, row["dtype"], row["gflops"], self.ceilings
                )
        return {
            "machine": machine.describe(self.device),
            "date": time.strftime("%Y-%m-%d"),
            "ceilings": self.ceilings,
            "rows": self.rows,
        }


RECORDER = pytest.StashKey[Recorder]()


@pytest.fixture(scope="session")
def recorder(request) -> Recorder:
    config = request.config
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch finds no CUDA device", returncode=2)
    start = time.monotonic()
    seconds = 0.02 if config.getoption("--grid") == "smoke" else 0.4
    deadline = start + config.getoption("--budget")
    found = Recorder(device, deadline, ceilings.measure(device, seconds))
    config.stash[RECORDER] = found
    return found


def pytest_sessionfinish(session):
    """Write what there is, also after an interrupt."""
    path, found = session.config.getoption("--rows-json"), session.config.stash.get(RECORDER, None)
    if path and found is not None:
        Path(path).write_text(json.dumps(found.document()))


def pytest_report_teststatus(report):
    """No letter per test: the recorder's lines say more."""
    if report.when == "call" or report.skipped:
        return report.outcome, "", report.outcome.upper()
    return None
