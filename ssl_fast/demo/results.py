"""What the demo found, for the table and for the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssl_fast.demo.scaling import SIDES, Point

if TYPE_CHECKING:
    from torch import Tensor

    from ssl_fast.demo.clustering import Clustering, Portrait
    from ssl_fast.demo.evaluation import Scores

UNTRAINED = "random init"


@dataclass(frozen=True)
class Results:
    """All that is shown at the end. Keys are ``SIDES``, and ``UNTRAINED`` among the scores."""

    scores: dict[str, Scores]
    losses: dict[str, list[float]]
    before: Tensor  # [T, 2] map of the untrained encoder's features
    after: Tensor  # [T, 2] map of those that ssl_fast's loss gave
    test_labels: Tensor  # [T]
    clusterings: dict[str, Clustering]  # keys: PIXELS and EMBEDDINGS
    portraits: list[Portrait]  # of the embeddings' clusters
    points: list[Point]
    labels_per_class: int
    threads: int

    def large_batch(self) -> Point | None:
        """The largest batch that both sides ran."""
        both = [p for p in self.points if all(side in p.seconds for side in SIDES)]
        return both[-1] if both else None


def readable_bytes(count: float) -> str:
    """Such as ``48 MiB`` or ``3.2 GiB``."""
    if count < 1023.5 * 2**20:
        mebibytes = count / 2**20
        return f"{mebibytes:.0f} MiB" if mebibytes >= 9.95 else f"{mebibytes:.1f} MiB"
    return f"{count / 2**30:.1f} GiB"


def readable_seconds(seconds: float) -> str:
    """Such as ``310 us``, ``3.1 ms`` or ``4.20 s``."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:
        milliseconds = seconds * 1e3
        return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"


def readable_share(part: float) -> str:
    """Such as ``97.3 %``; ``100 %`` only of all."""
    return "100 %" if part == 1.0 else f"{min(100 * part, 99.9):.1f} %"
