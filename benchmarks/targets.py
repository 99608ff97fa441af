"""What a release must reach: each ratio from one run in which the sides take turns.

``python -m benchmarks --targets`` prints every figure beside its goal and writes targets.json and
targets_<set>.json of the other sets; ``--targets contrastive`` is one set alone.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import (
    machine,
    targets_clustering,
    targets_contrastive,
    targets_linear,
    targets_pair_softmax,
    targets_reconstruction,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.figures import Figure

BUSY_SPREAD = 0.1


class Targets(NamedTuple):
    """A set that is measured together."""

    file: str
    measures: tuple[Callable[[int], list[Figure]], ...]


SETS = {
    "pair_softmax": Targets("targets.json", targets_pair_softmax.MEASURES),
    "contrastive": Targets("targets_contrastive.json", targets_contrastive.MEASURES),
    "clustering": Targets("targets_clustering.json", targets_clustering.MEASURES),
    "reconstruction": Targets(
        "targets_reconstruction.json",
        (*targets_reconstruction.MEASURES, *targets_linear.MEASURES),
    ),
}


def main(folder: Path, chosen: str = "all", scale: int = 1) -> int:
    """Measure a set of targets or all; 0 if all are met. ``scale`` divides the sizes."""
    print(machine.sentence(machine.describe()), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    missed = [
        _measure(targets, folder / targets.file, scale)
        for name, targets in SETS.items()
        if chosen in ("all", name)
    ]
    return 1 if any(missed) else 0


def _measure(targets: Targets, path: Path, scale: int) -> int:
    """Print a set's figures and write its file; how many are missed."""
    figures = []
    for measure in targets.measures:
        for figure in measure(scale):
            print(figure.line(), flush=True)
            figures.append(figure)
    document = {
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d"),
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    held = [figure.met for figure in figures if figure.met is not None]
    missed = held.count(False)
    print(f"{held.count(True)} of {len(held)} met; wrote {path}")
    noisy = [figure for figure in figures if figure.spread and figure.spread > BUSY_SPREAD]
    if noisy:
        print(
            f"{len(noisy)} figures come from rounds that differ by over {100 * BUSY_SPREAD:.0f}%: "
            "the machine was busy with something else, measure again"
        )
    return missed
