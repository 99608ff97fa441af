"""The list of checks against float64: every public function, dtype and shape."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu import checks_clusters, checks_contrastive, checks_reconstruction
from benchmarks.gpu.compare import Shape, Subject, against_float64
from benchmarks.gpu.findings import FAILED, Finding, Place, Task, attempt, healthy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUBJECTS = (*checks_contrastive.SUBJECTS, *checks_reconstruction.SUBJECTS)

# A kernel is compiled anew for each of the table's depths and for sizes that 16 divides or not,
# which takes longer than running it: the shapes that all dtypes share are few.
SHARED = (Shape(257, 19), Shape(1000, 128), Shape(33, 3))
MORE = {
    "fp32": (Shape(512, 300), Shape(1, 16)),
    "bf16": (Shape(512, 64), Shape(1537, 256), Shape(384, 768), Shape(2, 16)),
    "fp16": (Shape(640, 256), Shape(129, 1024)),
}
LOST = "the failure above took the card's context with it"
TINY = (Shape(9, 5), Shape(16, 8))


def shapes_for(subject: Subject | None, dtype: str, place: Place) -> tuple[Shape, ...]:
    if place.tiny:
        return TINY
    if subject is not None and subject.shapes:
        return subject.shapes
    return (*SHARED, *MORE[dtype])


def _over_shapes(name: str, check, shapes, place: Place) -> list[Finding]:
    """A finding for every shape; once the card's context is lost, the others are only named."""
    findings: list[Finding] = []
    lost = False
    for shape in shapes:
        what = f"{name} {shape}"
        if lost:
            findings.append(Finding("correctness", what, "skipped", LOST))
            continue
        findings.append(attempt("correctness", what, partial(check, shape)))
        lost = findings[-1].status == FAILED and not healthy(place)
    return findings


def _subject_task(subject: Subject, dtype: str) -> Task:
    name = f"{subject.name} {dtype}"

    def run(place: Place) -> list[Finding]:
        def check(shape: Shape) -> str:
            return against_float64(subject, shape, DTYPES[dtype], place.device, place.backend)

        return _over_shapes(name, check, shapes_for(subject, dtype, place), place)

    return Task("correctness", name, run)


def _search_task(search: checks_clusters.Search, dtype: str) -> Task:
    name = f"{search.name} {dtype}"

    def run(place: Place) -> list[Finding]:
        def check(shape: Shape) -> str:
            return search.check(shape, DTYPES[dtype], place.device, place.backend)

        return _over_shapes(name, check, shapes_for(None, dtype, place), place)

    return Task("correctness", name, run)


def tasks() -> list[Task]:
    """bf16 first: what a run that ends early has seen is what is used most."""
    found = []
    for dtype in ("bf16", "fp32", "fp16"):
        found += [_subject_task(subject, dtype) for subject in SUBJECTS]
        found += [_search_task(search, dtype) for search in checks_clusters.SEARCHES]
    return found
