"""Contrastive losses beside eager torch, torch.compile and fused classifications."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.cases import inputs as inputs_of
from benchmarks.gpu import peers
from benchmarks.gpu.races import (
    COMPILED,
    EAGER,
    OURS,
    Goal,
    Race,
    Side,
    Step,
    extra_gib,
    faster_than,
    part_of_memory,
    relative,
    share_of_peak,
)
from benchmarks.workloads import WORKLOADS, Loss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.findings import Place

# A dense loss in bf16 rounds its logits to 8 bits; the gate is that of the other benchmarks.
SAME = {"bf16": 6e-2, "fp32": 2e-4}
# The products that a target counts, where the sweep itself needs fewer or more.
PRODUCTS = {True: 3.0, False: 1.0}
SMALL = (256, 128)
SMALL_CALLS = 50


class Entry(NamedTuple):
    """A race's inputs: the case at its size here, the backend, and the tensors."""

    case: Case
    backend: str | None
    learned: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]


def step_of(entry: Entry, loss: Loss) -> Step:
    """One pass of a loss: its value, and the gradients where the case has them."""
    learned, fixed = entry.learned, entry.fixed

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return (loss(*learned, *fixed),)

    def both() -> Sequence[Tensor]:
        value = loss(*learned, *fixed)
        return value.detach(), *torch.autograd.grad(value, learned)

    return both if entry.case.gradient else forward


def _ours(entry: Entry) -> Step:
    return step_of(entry, WORKLOADS[entry.case.workload].ours(entry.case, entry.backend))


def _eager(entry: Entry) -> Step:
    return step_of(entry, WORKLOADS[entry.case.workload].eager(entry.case))


def _compiled(entry: Entry) -> Step:
    # Forgotten between races: the count of recompilations that a function may have is limited.
    torch.compiler.reset()
    eager = WORKLOADS[entry.case.workload].eager(entry.case)
    return step_of(entry, torch.compile(eager, dynamic=False))


def by_classes(case: Case, loss: peers.ClassLoss) -> Loss:
    """The workload written as classifications."""
    if case.workload == "clip":
        return peers.clip_by(loss)
    return peers.info_nce_by(loss, case.temperature)


def _fused(make: Callable[[], peers.ClassLoss]) -> Callable[[Entry], Step]:
    return lambda entry: step_of(entry, by_classes(entry.case, make()))


SIDES = {
    OURS: Side(OURS, _ours),
    EAGER: Side(EAGER, _eager),
    COMPILED: Side(COMPILED, _compiled),
    peers.CCE: Side(peers.CCE, _fused(peers.cut_cross_entropy), peer=True),
    peers.LIGER: Side(peers.LIGER, _fused(peers.liger), peer=True),
}


def race(
    case: Case, others: Sequence[str], goals: tuple[Goal, ...], calls: int = 1, gib: int = 16
) -> Race:
    """A race of one case."""

    def here(place: Place) -> Case:
        rows = max(16, case.rows // place.scale)
        return replace(case, rows=rows, dim=max(8, case.dim // place.scale), device=place.device)

    def inputs(place: Place) -> Entry:
        learned, fixed = inputs_of(here(place))
        for tensor in learned:
            tensor.requires_grad_(case.gradient)
        return Entry(here(place), place.served, learned, fixed)

    def flops(place: Place) -> float:
        now = here(place)
        return 2.0 * now.rows * now.columns * now.dim * PRODUCTS[case.gradient]

    sides = tuple(SIDES[name] for name in (OURS, *others))
    compare: Callable[[Any, Any, Any], float] = relative
    return Race(
        case.label, inputs, sides, goals, compare, SAME[case.dtype], flops=flops, calls=calls,
        bytes=gib * 2**30,
    )  # fmt: skip


def _small(workload: str, dtype: str) -> Race:
    case = Case(workload, *SMALL, dtype)
    return race(case, (EAGER,), (faster_than(EAGER, 1.0),), SMALL_CALLS, gib=1)


RACES = (
    race(
        Case("info_nce", 32768, 512, "bf16", gradient=False),
        (EAGER, COMPILED), (share_of_peak(65.0),),
    ),
    race(
        Case("info_nce", 32768, 512, "bf16"),
        (EAGER, COMPILED, peers.CCE, peers.LIGER),
        (share_of_peak(50.0), faster_than(COMPILED, 1.5), part_of_memory(EAGER, 1 / 20)),
    ),
    # A dense matrix of its logits has 8 GiB, and there are five of them: not for eager torch.
    race(
        Case("clip", 65536, 768, "bf16"),
        (peers.CCE, peers.LIGER),
        (extra_gib(2.0), faster_than(peers.CCE, 1.5)),
    ),
    race(Case("nt_xent", 2 * 16384, 256, "bf16"), (EAGER, COMPILED), (faster_than(COMPILED, 2.0),)),
    _small("info_nce", "fp32"),
    _small("info_nce", "bf16"),
    _small("nt_xent", "fp32"),
    _small("clip", "fp32"),
    _small("siglip", "fp32"),
)  # fmt: skip
