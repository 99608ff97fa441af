"""``python -m benchmarks.gpu``: right answers first, then speed, in under eight minutes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import RESULTS

DEFAULT_BUDGET = 480.0
# Checks that share the card: most of their time compiles kernels, on one core each. Each process
# holds about half a GiB of the card's memory.
MOST_PROCESSES = 12


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        print("error: torch finds no CUDA device, and this needs one", file=sys.stderr)
        return 2
    from benchmarks.gpu.findings import Place

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return run(Place(), options.out, options.budget, max(1, min(MOST_PROCESSES, cores - 2)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json, .md, .png")
    parser.add_argument(
        "--budget", type=float, default=DEFAULT_BUDGET,
        help=f"seconds after which nothing more is begun (default: {DEFAULT_BUDGET:.0f})",
    )  # fmt: skip
    return parser.parse_args(arguments)


def run(place: Any, folder: Path, budget: float, processes: int) -> int:
    """Perform everything and write what was found; with no processes, all of it in this one."""
    from benchmarks.gpu import card, plan, report, workers

    start = time.monotonic()
    machine = card.describe(place.device)
    print(card.sentence(machine), flush=True)
    findings = []

    def told(found: list[Any]) -> None:
        findings.extend(found)
        for finding in found:
            print(finding.line(), flush=True)

    tasks = plan.tasks()
    together = [task for task in tasks if task.group not in plan.ALONE]
    alone = [task for task in tasks if task.group in plan.ALONE]
    for some, count in ((together, processes), (alone, min(1, processes))):
        if count:
            workers.in_processes(some, place, start + budget, told, count)
        else:
            workers.in_this_process(some, place, start + budget, told)
    document = {
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - start, 1),
        "findings": [finding.as_json() for finding in findings],
    }
    wrote = report.write(document, folder)
    print(f"\n{report.summary(document)}\n\nwrote {', '.join(map(str, wrote))}")
    return report.exit_code(document)


if __name__ == "__main__":
    raise SystemExit(main())
