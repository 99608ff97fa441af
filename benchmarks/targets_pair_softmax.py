"""What InfoNCE and NT-Xent must reach."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.figures import Figure, Group, extra_memory
from benchmarks.sides import COMPILED, EAGER, NATIVE, ONE_SIDED


def _plain(scale: int) -> list[Figure]:
    case = Case("info_nce", 8192 // scale, 128, normalize=False)
    group = Group(case, (NATIVE, EAGER, COMPILED), peak=True)
    return [group.ratio(EAGER, 3.0), group.ratio(COMPILED, 1.8), group.share(78.0)]


def _forward_only(scale: int) -> list[Figure]:
    case = Case("info_nce", 8192 // scale, 128, gradient=False, normalize=False)
    return [Group(case, (NATIVE,), peak=True).share(85.0)]


def _bf16(scale: int) -> list[Figure]:
    case = Case("info_nce", 8192 // scale, 128, "bf16", normalize=False)
    group = Group(case, (NATIVE, EAGER, COMPILED))
    return [group.ratio(EAGER, 3.0), group.ratio(COMPILED, 1.6)]


def _small(scale: int) -> list[Figure]:
    case = Case("info_nce", 256 // min(scale, 4), 128, normalize=False)
    return [Group(case, (NATIVE, EAGER), most_rounds=2000).ratio(EAGER, 1.0)]


def _large(scale: int) -> list[Figure]:
    case = Case("info_nce", 65536 // scale, 128, normalize=False)
    eager = EAGER.bytes_needed(case) / 2**30
    detail = f"eager would need {eager:.0f} GiB for three dense matrices"
    return [extra_memory(case, 128.0, detail)]


def _nt_xent(scale: int) -> list[Figure]:
    group = Group(Case("nt_xent", 8192 // scale, 128), (NATIVE, EAGER, ONE_SIDED))
    return [group.ratio(EAGER, 5.0), group.ratio(ONE_SIDED, 1.25)]


MEASURES = (_plain, _forward_only, _bf16, _small, _large, _nt_xent)
