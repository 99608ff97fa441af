"""What k-means and nearest neighbours must reach beside scikit-learn, FAISS and superkmeans."""

from __future__ import annotations

import gc
import importlib.util
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

import ssl_fast
from benchmarks import memory, timing
from benchmarks.ceilings import fma_peak
from benchmarks.figures import PEAK_SECONDS, SECONDS_PER_GROUP, Figure, ratio, told
from ssl_fast.demo.memory import peak_extra_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ITERATIONS = 10
# The last digits of an inertia are those of its summation; FAISS and superkmeans sum in fp32.
SAME = 2e-4


class Clustering(NamedTuple):
    """Problems of one size, the same for all sides: ten iterations from the same centroids."""

    name: str
    rows: int
    dim: int
    clusters: int
    problems: int = 1
    spectrum: bool = False  # a power law, rows of norm 1
    dtype: str = "float32"

    @property
    def label(self) -> str:
        many = f"{self.problems} x " if self.problems > 1 else ""
        return f"{self.name}: {many}N={self.rows} D={self.dim} K={self.clusters} {self.dtype}"

    def small(self) -> Clustering:
        return self._replace(rows=max(8, self.rows // 50), clusters=max(2, self.clusters // 50))

    @property
    def flops(self) -> float:
        """Of ten iterations and the labels of the centroids that they end with."""
        return 2.0 * (ITERATIONS + 1) * self.problems * self.rows * self.dim * self.clusters


CASES = {
    "a": Clustering("a", 100_000, 128, 1024),
    "b": Clustering("b", 1_000_000, 64, 256),
    "c": Clustering("c", 50_000, 768, 100),
    "d": Clustering("d", 4096, 64, 64, problems=64),
    "e": Clustering("e", 50_000, 768, 1000, spectrum=True),
}
GOALS = {"a": 1.6, "b": 1.8, "c": 1.3, "d": 2.5, "e": 2.2}
MEMORY_GOAL = 16.0


def scaled(case: Clustering, scale: int) -> Clustering:
    return case._replace(
        rows=max(16, case.rows // scale),
        clusters=max(2, case.clusters // scale),
        problems=max(1, case.problems // scale),
    )


def data(case: Clustering) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B, N, D] and the centroids to start from, rows of each problem [B, K, D]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.problems, case.rows, case.dim, generator=generator)
    if case.spectrum:
        x *= torch.arange(1, case.dim + 1) ** -0.5
        x = torch.nn.functional.normalize(x, dim=2)
    x = x.to(getattr(torch, case.dtype))
    return x, x[:, : case.clusters].clone()


def ours(case: Clustering) -> Callable[[], float]:
    """The inertia of all problems together, as of every side."""
    x, init = data(case)

    def run() -> float:
        result = ssl_fast.batched_kmeans(
            x, case.clusters, init=init, max_iter=ITERATIONS, tol=0.0, backend="native"
        )
        return float(result.inertia.sum())

    return run


def scikit_learn(case: Clustering) -> Callable[[], float]:
    from sklearn.cluster import KMeans

    x, init = (part.numpy() for part in data(case))

    def run() -> float:
        return sum(
            float(
                KMeans(case.clusters, init=start, n_init=1, max_iter=ITERATIONS, tol=0.0)
                .fit(rows)
                .inertia_
            )
            for rows, start in zip(x, init, strict=True)
        )

    return run


def faiss(case: Clustering) -> Callable[[], float]:
    """With its labels of the final centroids, which scikit-learn and we give as well."""
    import faiss as library

    library.omp_set_num_threads(torch.get_num_threads())
    x, init = (part.numpy() for part in data(case))

    def run() -> float:
        total = 0.0
        for rows, start in zip(x, init, strict=True):
            means = library.Kmeans(
                case.dim, case.clusters, niter=ITERATIONS, max_points_per_centroid=10**9,
                min_points_per_centroid=1,
            )  # fmt: skip
            means.train(rows, init_centroids=start)
            total += float(means.assign(rows)[0].sum())
        return total

    return run


PEERS = {"scikit-learn": scikit_learn, "FAISS": faiss}
MODULES = {"scikit-learn": "sklearn", "FAISS": "faiss"}


def measured(
    calls: Mapping[str, Callable[[], float]], exact: str, *, same: float = SAME, least: int = 3
) -> tuple[dict[str, timing.Times], str | None]:
    """Seconds of the sides that agree with ``exact``, and what was wrong with the others."""
    values = {name: call() for name, call in calls.items()}
    wrong = [
        f"{name} found {value:.7g}, {exact} {values[exact]:.7g}"
        for name, value in values.items()
        if abs(value - values[exact]) > same * abs(values[exact])
    ]
    if wrong:
        return {}, "; ".join(wrong)
    seconds = sum(timing.once(call) for call in calls.values())
    rounds = timing.rounds_for(seconds, budget=SECONDS_PER_GROUP, least=least, most=15)
    return timing.alternate(calls, rounds), None


def _peak(case: Clustering, times: dict[str, timing.Times], peak: list[float]) -> Figure:
    value, detail = None, "no FMA peak without native kernels"
    if times and peak:
        gflops = case.flops / times["ssl_fast"].median / 1e9
        value, detail = 100 * gflops / max(peak), f"{gflops:.0f} of {max(peak):.0f} GFLOP/s"
    return Figure(
        case.label, "of the FMA peak", value, None, at_least=True, unit="%", detail=detail
    )


def memory_job(case: Clustering) -> Callable[[], object]:
    """For a child process: our run on data that is there already."""
    ours(case.small())()
    x, init = data(case)
    gc.collect()
    memory.trim()
    return lambda: ssl_fast.batched_kmeans(
        x, case.clusters, init=init, max_iter=ITERATIONS, tol=0.0, backend="native"
    )


def _memory(case: Clustering) -> Figure:
    extra = peak_extra_bytes(memory_job, case)
    value = None
    if extra is not None:
        rows = case.problems * case.rows
        labels, centroids = 8 * rows, 4 * case.problems * case.clusters * case.dim
        value = max(0, extra - labels - centroids) / 2**20
    detail = "above data, labels and centroids"
    return Figure(
        case.label, "extra memory", value, MEMORY_GOAL, at_least=False, unit=" MiB", detail=detail
    )


def lloyd(name: str) -> Callable[[int], list[Figure]]:
    """Ten iterations of one case beside the faster of the peers that are installed."""

    def measure(scale: int) -> list[Figure]:
        case = scaled(CASES[name], scale)
        others = {"scikit-learn": scikit_learn} if name == "e" else PEERS
        missing = [name for name in others if importlib.util.find_spec(MODULES[name]) is None]
        calls = {"ssl_fast": ours(case)}
        calls |= {name: make(case) for name, make in others.items() if name not in missing}
        found: list[float] = []

        def peak() -> float:
            sample = fma_peak("fp32", PEAK_SECONDS)
            found.extend([] if sample is None else [sample])
            return expected

        expected = calls["ssl_fast"]()
        calls["FMA peak"] = peak
        times, wrong = measured(calls, "ssl_fast")
        figures = [
            ratio(case.label, f"against {other}", GOALS[name], times, wrong, "ssl_fast", other)
            for other in others
            if other in calls
        ]
        figures += [
            Figure(case.label, f"against {other}", None, None, at_least=True, unit="x",
                   detail="not installed")
            for other in missing
        ]  # fmt: skip
        return [*figures, _peak(case, times, found), _memory(case)]

    return measure


def _seeding(scale: int) -> list[Figure]:
    """Greedy k-means++ of case a beside our ten iterations of it."""
    case = scaled(CASES["a"], scale)
    x, _ = data(case)

    def seed() -> float:
        generator = torch.Generator().manual_seed(0)
        result = ssl_fast.batched_kmeans(
            x, case.clusters, max_iter=1, tol=0.0, generator=generator, backend="native"
        )
        return float(result.inertia.sum())

    first = ours(case)
    calls = {"iterations": first, "seeding and one iteration": seed}
    seconds = sum(timing.once(call) for call in calls.values())
    rounds = timing.rounds_for(seconds, budget=SECONDS_PER_GROUP, least=3, most=15)
    times = timing.alternate(calls, rounds)
    ten, seeded = times["iterations"], times["seeding and one iteration"]
    # An iteration and the labels that follow it are two of the eleven assignments.
    seconds = seeded.median - ten.median * 2 / (ITERATIONS + 1)
    detail = f"{1e3 * seconds:.4g} ms of k-means++ against {told(ten)}, {rounds} rounds"
    return [
        Figure(
            case.label, "ten iterations against seeding", ten.median / seconds, 1.0,
            at_least=True, unit="x", detail=detail, spread=max(ten.spread, seeded.spread),
        )
    ]  # fmt: skip


def _bf16(scale: int) -> list[Figure]:
    """Certified bfloat16 beside our fp32 on the same values."""
    figures = []
    for name in "abc":
        case = scaled(CASES[name], scale)
        half = case._replace(dtype="bfloat16")
        calls = {"fp32": ours(case), "bf16": ours(half)}
        # Centroids are rounded to bfloat16 in every iteration, so the inertias differ.
        times, wrong = measured(calls, "fp32", same=0.02)
        figures.append(ratio(half.label, "against our fp32", 1.5, times, wrong, "bf16", "fp32"))
    return figures


def _neighbors(scale: int) -> list[Figure]:
    """The 20 nearest of 100k rows for 10k queries, beside FAISS's flat index."""
    queries, rows, dim, k = max(8, 10_000 // scale), max(32, 100_000 // scale), 128, 20
    label = f"kNN {queries} x {rows}, D={dim}, k={k} float32"
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, dim, generator=generator) for n in (queries, rows))

    def mine() -> float:
        return float(ssl_fast.knn(x, y, k, backend="native")[0].double().sum())

    calls: dict[str, Callable[[], float]] = {"ssl_fast": mine}
    if importlib.util.find_spec("faiss") is None:
        return [Figure(label, "against FAISS", None, 1.5, at_least=True, unit="x",
                       detail="not installed")]  # fmt: skip
    import faiss as library

    library.omp_set_num_threads(torch.get_num_threads())

    def theirs() -> float:
        index = library.IndexFlatL2(dim)
        index.add(y.numpy())
        return float(index.search(x.numpy(), k)[0].astype(np.float64).sum())

    calls["FAISS"] = theirs
    times, wrong = measured(calls, "ssl_fast")
    return [ratio(label, "against FAISS", 1.5, times, wrong, "ssl_fast", "FAISS")]


MEASURES = (*(lloyd(name) for name in CASES), _seeding, _bf16, _neighbors)
