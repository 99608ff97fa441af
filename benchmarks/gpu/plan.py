"""Everything the run does, in its order: what is right, then what it takes."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu import (
    checks,
    checks_large,
    properties,
    races,
    races_clusters,
    races_contrastive,
    races_reconstruction,
)
from benchmarks.gpu.findings import GROUPS, Finding, Place, Task
from ssl_fast.backends import dispatch

RACES = (*races_contrastive.RACES, *races_clusters.RACES, *races_reconstruction.RACES)
# A card whose time or memory others share gives no times: these have it to themselves.
ALONE = ("large", "memory", "speed")


# Functions that CUDA kernels of the native backend serve beside Triton's, where they were built.
NATIVE = {
    "reconstruction_loss": "reconstruction",
    "l2_sp": "l2_sp",
    "kmeans_update": "centroid_update",
}


def on_native(task: Task) -> Task:
    """The same task on the native backend; skipped where that refuses."""
    op = NATIVE[task.name.replace(",", " ").split()[0]]

    def run(place: Place) -> list[Finding]:
        try:
            dispatch.resolve(op, place.device, torch.bfloat16, (64, 64), "native")
        except RuntimeError as error:
            reason = str(error).partition(": ")[2]
            return [Finding(task.group, f"{task.name} native", "skipped", reason)]
        found = task.run(replace(place, backend="native"))
        return [replace(finding, name=f"{finding.name} native") for finding in found]

    return replace(task, name=f"{task.name} native", run=run)


def tasks() -> list[Task]:
    right = [*checks.tasks(), *checks_large.tasks(), *properties.tasks()]
    native = [on_native(x) for x in right if x.name.replace(",", " ").split()[0] in NATIVE]
    found = [*right, *native, *(races.task(race) for race in RACES)]
    return sorted(found, key=lambda task: GROUPS.index(task.group))


def by_key() -> dict[str, Task]:
    return {task.key: task for task in tasks()}
