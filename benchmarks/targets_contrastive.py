"""What CLIP, SigLIP, SupCon, a queue and a ring of processes must reach."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import ring, timing
from benchmarks.cases import Case
from benchmarks.figures import (
    MOST_ROUNDS,
    SECONDS_PER_GROUP,
    Figure,
    Group,
    extra_memory,
    less_memory,
    told,
)
from benchmarks.sides import EAGER, METRIC_LEARNING_SUP_CON, NATIVE, OPEN_CLIP, Side

PROCESSES = 2
# None: InfoNCE in one process makes its gradient in the forward pass, from three products. A ring
# needs four, for no row's statistics are whole before the last key has come by.
RING_GOALS = {"clip": 80.0, "info_nce": None}


def _clip(scale: int) -> list[Figure]:
    return _faster_in_less(Case("clip", 8192 // scale, 512), OPEN_CLIP, 2.2, 20.0)


def _sup_con(scale: int) -> list[Figure]:
    case = Case("sup_con", 8192 // scale, 128)
    return _faster_in_less(case, METRIC_LEARNING_SUP_CON, 18.0, 50.0)


def _siglip(scale: int) -> list[Figure]:
    return _faster_in_less(Case("siglip", 8192 // scale, 512), OPEN_CLIP, 2.1, 20.0)


def _faster_in_less(case: Case, other: Side, faster: float, less: float) -> list[Figure]:
    group = Group(case, (NATIVE, other), peak=True)
    return [group.ratio(other, faster), less_memory(case, other, less), group.share(None)]


def _queue(scale: int) -> list[Figure]:
    case = Case("info_nce_queue", max(8, 256 // scale), 128, queue=65536 // scale)
    group = Group(case, (NATIVE, EAGER), peak=True, most_rounds=100)
    held = case.queue * case.dim * case.torch_dtype.itemsize / 2**20
    # Half of the queue: a copy of it would not fit.
    memory = extra_memory(case, held / 2, f"the queue itself holds {held:.3g} MiB")
    return [group.ratio(EAGER, 3.5), memory, group.share(None)]


def _ring(scale: int) -> list[Figure]:
    figures = []
    for case in (Case("clip", 8192 // scale, 512), Case("info_nce", 8192 // scale, 128)):
        figures += ring_figures(case, NATIVE)
    return figures


def ring_figures(case: Case, side: Side) -> list[Figure]:
    """A ring's efficiency and its gradient, beside one process with the threads of all."""
    label = f"{case.label}, {PROCESSES} processes"
    efficiency = Figure(
        label, "of one process's speed", None, RING_GOALS[case.workload],
        at_least=True, unit="%", detail="",
    )  # fmt: skip
    difference = Figure(
        label, "gradient difference", None, 1e-5, at_least=False, unit="", detail=""
    )
    threads = torch.get_num_threads()
    each = max(1, threads // PROCESSES)
    torch.set_num_threads(PROCESSES * each)
    try:
        reason = side.refuses(case)
        if reason is not None:
            raise ring.RingError(reason)
        with ring.Ring(case, side.backend, PROCESSES, each) as processes:
            step = side.step(case)
            apart = ring.difference(step(), processes.outcome())
            calls = {"one": step, "ring": processes.step}
            seconds = sum(timing.once(call) for call in calls.values())
            rounds = timing.rounds_for(seconds, budget=SECONDS_PER_GROUP, least=5, most=MOST_ROUNDS)
            times = timing.alternate(calls, rounds)
    except ring.RingError as error:
        return [replace(figure, detail=str(error)) for figure in (efficiency, difference)]
    finally:
        torch.set_num_threads(threads)
    one, all_ = times["one"], times["ring"]
    detail = (
        f"one process with {PROCESSES * each} threads {told(one)}, {PROCESSES} with {each} each "
        f"{told(all_)}, {rounds} rounds"
    )
    spread = max(one.spread, all_.spread)
    value = 100 * one.median / all_.median
    return [
        replace(efficiency, value=value, detail=detail, spread=spread),
        replace(difference, value=apart, detail="relative, the worst of the inputs"),
    ]


MEASURES = (_clip, _sup_con, _siglip, _queue, _ring)
