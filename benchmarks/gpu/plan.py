"""Everything the run does, in its order: what is right, then what it takes."""

from __future__ import annotations

from benchmarks.gpu import (
    checks,
    checks_large,
    properties,
    races,
    races_clusters,
    races_contrastive,
    races_reconstruction,
)
from benchmarks.gpu.findings import GROUPS, Task

RACES = (*races_contrastive.RACES, *races_clusters.RACES, *races_reconstruction.RACES)
# A card whose time or memory others share gives no times: these have it to themselves.
ALONE = ("large", "memory", "speed")


def tasks() -> list[Task]:
    found = [
        *checks.tasks(), *checks_large.tasks(), *properties.tasks(),
        *(races.task(race) for race in RACES),
    ]  # fmt: skip
    return sorted(found, key=lambda task: GROUPS.index(task.group))


def by_key() -> dict[str, Task]:
    return {task.key: task for task in tasks()}
