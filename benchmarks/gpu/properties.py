"""What a result must do besides being right: repeat, capture, compile, stay small."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch

import ssl_fast
from benchmarks.gpu.checks import SUBJECTS
from benchmarks.gpu.checks_clusters import rows_of
from benchmarks.gpu.compare import (
    Inputs,
    Shape,
    Subject,
    outputs_of,
    part_of_allowed,
    values_and_gradients,
)
from benchmarks.gpu.findings import Finding, Place, Task, attempt
from benchmarks.memory import cuda_peak

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

DTYPE = torch.bfloat16
REPEATS = 5
# For a graph's replay: other values in the same tensors.
SHIFT = 1.25
MEMORY_ROWS, MEMORY_DIM = 16384, 128
# Not of the native backend, whose kernel has the addresses among its arguments.
NO_GRAPH = {
    "l2_sp": "its table of addresses comes from pageable memory, which no capture takes",
}
_BASIC = (
    "info_nce", "info_nce with negatives", "nt_xent", "sup_con", "clip_loss", "siglip_loss",
    "reconstruction_loss mse", "reconstruction_loss bce_with_logits",
    "linear_reconstruction_loss mse", "mae_loss", "vae_loss", "l2_sp",
)  # fmt: skip


def basic() -> list[Subject]:
    """One subject for each public loss."""
    by_name = {subject.name: subject for subject in SUBJECTS}
    return [by_name[name] for name in _BASIC]


def _shape(subject: Subject, place: Place) -> Shape:
    if place.tiny:
        return Shape(16, 8)
    return subject.shapes[-1] if subject.shapes else Shape(1000, 128)


def _pass(subject: Subject, shape: Shape, place: Place) -> Callable[[Inputs], list[Tensor]]:
    def ours(given: Inputs) -> Any:
        return subject.ours(place.backend, *given.learned, *given.fixed)

    return lambda inputs: values_and_gradients(ours, inputs, subject.lift(shape))


def _same_bits(first: list[Tensor], second: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"{what}: result {i} differs in {int((a != b).sum())} elements")


def _repeats(call: Callable[[], list[Tensor]]) -> str:
    first = call()
    for number in range(1, REPEATS):
        _same_bits(first, call(), f"run {number + 1}")
    return f"{REPEATS} runs, the same bits"


def _determinism(subject: Subject) -> Task:
    def run(place: Place) -> list[Finding]:
        shape = _shape(subject, place)
        inputs = subject.inputs(shape, DTYPE, place.device)
        step = _pass(subject, shape, place)
        return [attempt("determinism", subject.name, lambda: _repeats(lambda: step(inputs)))]

    return Task("determinism", subject.name, run)


def _clustering_calls(place: Place) -> dict[str, Callable[[], list[Tensor]]]:
    """The functions of clustering on some rows, each with its tensors."""
    x, centroids = rows_of(Shape(16, 8) if place.tiny else Shape(4096, 128), DTYPE, place.device)
    count, backend = centroids.shape[1], place.backend
    labels, _ = ssl_fast.kmeans_assign(x, centroids, backend=backend)

    def lloyd() -> list[Tensor]:
        return list(
            ssl_fast.batched_kmeans(
                x, count, init=centroids, max_iter=5, tol=0.0, backend=backend
            )
        )  # fmt: skip

    return {
        "kmeans_assign": lambda: list(ssl_fast.kmeans_assign(x, centroids, backend=backend)),
        "kmeans_update": lambda: list(ssl_fast.kmeans_update(x, labels, count, backend=backend)),
        "batched_kmeans": lloyd,
        "knn": lambda: list(ssl_fast.knn(x, centroids, min(10, count), backend=backend)),
    }


def _clustering_determinism(place: Place) -> list[Finding]:
    return [
        attempt("determinism", name, lambda call=call: _repeats(call))
        for name, call in _clustering_calls(place).items()
    ]


@contextlib.contextmanager
def _side_stream() -> Iterator[None]:
    """Capture wants what it records to have run on a stream of its own before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _replayed(step: Callable[[Inputs], list[Tensor]], inputs: Inputs) -> str:
    """Capture, change the values in place, replay: the results are those of the new values."""
    with _side_stream():
        for _ in range(3):
            step(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    with torch.no_grad():
        for tensor in inputs.learned:
            tensor.mul_(SHIFT)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [x.clone() for x in captured]
    # The library may choose another product for a graph: near is enough, and equality is told.
    plain = step(inputs)
    for i, (x, e) in enumerate(zip(replayed, plain, strict=True)):
        part_of_allowed(x, e, DTYPE, what=f"replay: result {i}")
    same = all(torch.equal(x, e) for x, e in zip(replayed, plain, strict=True))
    return f"replayed with other values, {'the same' if same else 'other'} bits as without a graph"


def _graph(subject: Subject) -> Task:
    def run(place: Place) -> list[Finding]:
        if subject.name in NO_GRAPH and place.backend != "native":
            return [Finding("graph", subject.name, "told", NO_GRAPH[subject.name])]
        if place.device != "cuda":
            return [Finding("graph", subject.name, "skipped", "no card, no graph")]
        shape = _shape(subject, place)
        inputs = subject.inputs(shape, DTYPE, place.device)
        step = _pass(subject, shape, place)
        return [attempt("graph", subject.name, lambda: _replayed(step, inputs))]

    return Task("graph", subject.name, run)


def _compiled(subject: Subject) -> Task:
    def run(place: Place) -> list[Finding]:
        return [attempt("compile", subject.name, lambda: _whole(subject, place))]

    return Task("compile", subject.name, run)


def _whole(subject: Subject, place: Place) -> str:
    """One graph without a break, and the results of the call that isn't compiled."""
    shape = _shape(subject, place)
    inputs = subject.inputs(shape, DTYPE, place.device)
    torch.compiler.reset()

    def ours(*given: Tensor) -> tuple[Tensor, ...]:
        return outputs_of(subject.ours(place.backend, *given))

    # Inductor's code for a CPU is nothing that this run is about.
    backend = "inductor" if place.device == "cuda" else "aot_eager"
    compiled = torch.compile(ours, fullgraph=True, dynamic=False, backend=backend)
    start = time.perf_counter()
    found, plain = (
        values_and_gradients(
            lambda given, call=call: call(*given.learned, *given.fixed), inputs, 1.0
        )
        for call in (compiled, ours)
    )
    for i, (a, b) in enumerate(zip(found, plain, strict=True)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3, msg=f"result {i} differs")
    return f"one graph, {time.perf_counter() - start:.0f} s to compile"


def _memory(subject: Subject) -> Task:
    """The peak above the inputs, gradients included, beside one dense matrix of the pairs."""

    def check(place: Place) -> str:
        shape = Shape(MEMORY_ROWS, MEMORY_DIM)
        inputs = subject.inputs(shape, DTYPE, place.device)
        step = _pass(subject, shape, place)
        step(inputs)
        extra = cuda_peak(lambda: step(inputs))
        rows = len(inputs.learned[0]) * (2 if subject.name == "nt_xent" else 1)
        matrix = rows * rows * DTYPE.itemsize
        told = f"{extra / 2**20:.0f} MiB, a dense matrix has {matrix / 2**20:.0f} MiB"
        if extra > matrix:  # a strip of 256 MiB is the losses' largest workspace
            raise AssertionError(told)
        return told

    def run(place: Place) -> list[Finding]:
        if place.device != "cuda":
            return [Finding("memory", subject.name, "skipped", "no card, no counter")]
        return [attempt("memory", subject.name, lambda: check(place))]

    return Task("memory", subject.name, run, bytes=4 * 2**30)


_OF_PAIRS = ("info_nce", "nt_xent", "sup_con", "clip_loss", "siglip_loss")


def tasks() -> list[Task]:
    subjects = basic()
    return [
        *map(_determinism, subjects),
        Task("determinism", "clustering", _clustering_determinism),
        *map(_graph, subjects),
        *map(_compiled, subjects),
        *(_memory(subject) for subject in subjects if subject.name in _OF_PAIRS),
    ]
