"""The demo's closing tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssl_fast.demo.clustering import EMBEDDINGS, STARTS
from ssl_fast.demo.data import CLASSES
from ssl_fast.demo.evaluation import NEIGHBOURS
from ssl_fast.demo.reconstruction import PER_CLASS
from ssl_fast.demo.results import (
    UNTRAINED,
    Results,
    readable_bytes,
    readable_seconds,
    readable_share,
)
from ssl_fast.demo.scaling import DIM, OURS, PLAIN, Point

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ssl_fast.demo.reconstruction import Reconstructions

_COLUMNS = (UNTRAINED, PLAIN, OURS)
_TITLE_WIDTH, _WIDTH = 44, 13
_CLUSTER_COLUMNS = ("adj. Rand", "NMI", "inertia", "iterations", "time", "same labels")
_SPACE_WIDTH, _CLUSTER_WIDTH = 26, 12


def render(results: Results) -> str:
    """The tables as text."""
    labels = results.labels_per_class * CLASSES
    lines = ["", _row("", dict(zip(_COLUMNS, _COLUMNS, strict=True)))]
    lines.append("-" * len(lines[-1]))
    probe = {name: f"{100 * score.probe:.1f} %" for name, score in results.scores.items()}
    vote = {name: f"{100 * score.neighbours:.1f} %" for name, score in results.scores.items()}
    lines.append(_row(f"linear probe, {labels} labels, test accuracy", probe))
    lines.append(_row(f"{NEIGHBOURS} nearest neighbours, same labels", vote))
    final = {side: f"{losses[-1]:.4f}" for side, losses in results.losses.items()}
    lines.append(_row("NT-Xent loss, last epoch", final))
    lines.extend(_clusters(results))
    large = results.large_batch()
    if large is not None:
        lines.append("")
        lines.extend(_large_batch(large))
    for point in results.points:
        for side, reason in point.skipped.items():
            lines.append(f"batch {point.batch}: {side} skipped: it {reason}{_other(point)}")
    return "\n".join(lines)


def render_reconstructions(found: Reconstructions) -> str:
    """The tables of the second step as text."""
    lines = ["", _cells("loss, the same seed and batches", ("epoch 1", PLAIN, "last epoch"))]
    lines.append("-" * len(lines[-1]))
    for name, losses in found.losses.items():
        ours, plain = losses[OURS], losses[PLAIN]
        lines.append(_cells(name, (f"{ours[0]:.4f}", f"{plain[0]:.4f}", f"{ours[-1]:.4f}")))
    labels = PER_CLASS * CLASSES
    lines += [
        "",
        _cells(f"frozen features, {labels} labels", ("probe", f"{NEIGHBOURS} neighbours")),
    ]
    lines.append("-" * len(lines[-1]))
    for name, score in found.scores.items():
        lines.append(_cells(name, (readable_share(score.probe), readable_share(score.neighbours))))
    lines += ["", _cells(f"fine-tuned from {labels} labels", ("mean", "least", "most"))]
    lines.append("-" * len(lines[-1]))
    for tuning in found.tunings:
        scores = tuning.accuracies
        shown = (sum(scores) / len(scores), min(scores), max(scores))
        lines.append(_cells(tuning.start, tuple(map(readable_share, shown))))
    return "\n".join(lines)


def _cells(
    title: str, cells: Sequence[str], title_width: int = _TITLE_WIDTH, width: int = _WIDTH
) -> str:
    return f"{title:<{title_width}}" + "".join(f"{cell:>{width}}" for cell in cells)


def _clusters(results: Results) -> list[str]:
    images = len(results.clusterings[EMBEDDINGS].labels)
    title = f"k-means of the {images} train images, {CLASSES} clusters, best of {STARTS} starts"
    lines = ["", title, _cells("", _CLUSTER_COLUMNS, _SPACE_WIDTH, _CLUSTER_WIDTH)]
    lines.append("-" * len(lines[-1]))
    for space, clustering in results.clusterings.items():
        for side, fit in clustering.fits.items():
            cells = (
                f"{fit.rand:.3f}",
                f"{fit.information:.3f}",
                f"{fit.inertia:.2f}",
                str(fit.iterations),
                readable_seconds(fit.seconds),
                "-" if side == OURS else readable_share(clustering.agreement),
            )
            lines.append(_cells(f"{space}, {side}", cells, _SPACE_WIDTH, _CLUSTER_WIDTH))
    return lines


def _large_batch(point: Point) -> list[str]:
    lines = [f"loss and gradient, batch {point.batch} (synthetic: {2 * point.batch} x {DIM}, fp32)"]
    lines.append(
        _row("  time", {side: readable_seconds(s) for side, s in point.seconds.items()})
        + _ratio(point.seconds, "faster", "slower")
    )
    if point.extra_bytes:
        memory = {side: readable_bytes(count) for side, count in point.extra_bytes.items()}
        ratio = _ratio(point.extra_bytes, "less", "more")
        lines.append(_row("  peak memory beyond the inputs", memory) + ratio)
    return lines


def _ratio(values: Mapping[str, float], less: str, more: str) -> str:
    ours, plain = values.get(OURS), values.get(PLAIN)
    if not ours or not plain:
        return ""
    ratio, word = (plain / ours, less) if ours <= plain else (ours / plain, more)
    return f"   {ratio:.0f} x {word}" if ratio >= 20 else f"   {ratio:.1f} x {word}"


def _other(point: Point) -> str:
    if OURS not in point.seconds:
        return ""
    took = f"; {OURS} took {readable_seconds(point.seconds[OURS])}"
    if OURS in point.extra_bytes:
        took += f" and {readable_bytes(point.extra_bytes[OURS])}"
    return took


def _row(title: str, cells: dict[str, str]) -> str:
    return _cells(title, [cells.get(column, "-") for column in _COLUMNS])
