"""The demo's picture: what pretraining did to the features, and what each loss costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssl_fast.demo.clustering import EMBEDDINGS, PIXELS
from ssl_fast.demo.data import CLASSES
from ssl_fast.demo.evaluation import NEIGHBOURS
from ssl_fast.demo.extras import require
from ssl_fast.demo.results import (
    UNTRAINED,
    Results,
    readable_bytes,
    readable_seconds,
    readable_share,
)
from ssl_fast.demo.scaling import DIM, OURS, PLAIN, SIDES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SUFFIXES = {".png", ".pdf", ".svg", ".jpg"}

_COLORS = {UNTRAINED: "#b8bcc4", PLAIN: "#e08a2e", OURS: "#1f66b0"}
_MARKERS = {PLAIN: "s", OURS: "o"}
STYLE = {
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.grid": False,
    "grid.color": "#e6e8ec",
    "font.family": "DejaVu Sans",
}


def draw(results: Results, path: Path) -> None:
    """Write the picture; the format follows the file's ending."""
    # The figure is made without pyplot, so that no display and no global state is touched.
    figure_module: Any = require("matplotlib.figure")
    matplotlib: Any = require("matplotlib")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(figsize=(15.5, 11.4), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.14, wspace=0.02, hspace=0.03)
        panels, row = figure.subfigures(2, 1, height_ratios=(9.0, 2.2))
        axes = panels.subplots(2, 3)
        _draw_map(
            axes[0][0], results.before, results.test_labels, "Test images before: untrained encoder"
        )
        handles = _draw_map(
            axes[0][1], results.after, results.test_labels, "After: pretrained with ssl_fast"
        )
        axes[0][1].legend(
            handles=handles, title="digit", loc="center left", bbox_to_anchor=(1.0, 0.5)
        )
        _draw_losses(axes[0][2], results)
        _draw_scores(axes[1][0], results)
        _draw_time(axes[1][1], results)
        _draw_memory(axes[1][2], results)
        _draw_clusters(row, results)
        figure.suptitle(
            "Contrastive pretraining on scikit-learn's digits: the same loss, "
            "as a sweep (ssl_fast) and through a dense matrix (plain torch)",
            fontsize=13.5,
            fontweight="bold",
        )
        figure.savefig(path, dpi=130)


def _draw_map(axis: Any, plane: Tensor, labels: Tensor, title: str) -> list[Any]:
    matplotlib: Any = require("matplotlib")
    colors = matplotlib.colormaps["tab10"]
    handles = []
    for digit in range(CLASSES):
        points = plane[labels == digit].numpy()
        handles.append(
            axis.scatter(
                points[:, 0], points[:, 1], s=17, color=colors(digit), alpha=0.85, linewidths=0,
                label=str(digit),
            )
        )  # fmt: skip
    axis.set(title=title, xticks=[], yticks=[], xlabel="t-SNE of the features (no units)")
    axis.spines[:].set_visible(True)
    axis.spines[:].set_color("#c9ccd2")
    return handles


def _draw_losses(axis: Any, results: Results) -> None:
    widths = {PLAIN: 5.0, OURS: 1.6}
    for side in (PLAIN, OURS):
        losses = results.losses[side]
        axis.plot(
            range(1, len(losses) + 1), losses, color=_COLORS[side],
            lw=widths[side], alpha=0.55 if side == PLAIN else 1.0, label=side,
        )  # fmt: skip
    pairs = zip(results.losses[PLAIN], results.losses[OURS], strict=True)
    apart = max(abs(plain - ours) for plain, ours in pairs)
    axis.set(
        title="Pretraining loss, same seed and batches",
        xlabel="epoch",
        ylabel="NT-Xent loss (nats)",
    )
    ticker: Any = require("matplotlib.ticker")
    axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axis.legend(title=f"largest gap {apart:.1g}", loc="upper right")
    axis.grid(True)


def _draw_scores(axis: Any, results: Results) -> None:
    names = (UNTRAINED, PLAIN, OURS)
    groups = {
        "linear probe": [100 * results.scores[name].probe for name in names],
        f"{NEIGHBOURS} nearest neighbours": [100 * results.scores[n].neighbours for n in names],
    }
    width = 0.26
    for column, name in enumerate(names):
        heights = [values[column] for values in groups.values()]
        places = [group + (column - 1) * width for group in range(len(groups))]
        label = "untrained" if name == UNTRAINED else f"pretrained, {name}"
        bars = axis.bar(places, heights, width * 0.92, color=_COLORS[name], label=label)
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    lowest = min(min(values) for values in groups.values())
    # Bars that start at zero would hide the differences; the axis says where it starts.
    floor = max(0.0, 10 * int((lowest - 8) / 10))
    axis.set(
        title=f"Accuracy from {CLASSES * results.labels_per_class} labels, frozen features",
        ylabel=f"test accuracy (%), from {floor:.0f}" if floor else "test accuracy (%)",
        ylim=(floor, 100 + 0.24 * (100 - floor)),
        xticks=range(len(groups)),
        xticklabels=list(groups),
    )
    axis.set_yticks(list(range(int(floor), 101, 10)))
    axis.legend(loc="upper center", ncols=3, fontsize=8.5, columnspacing=1.0, handlelength=1.2)


def _draw_time(axis: Any, results: Results) -> None:
    _draw_cost(axis, results, "seconds")
    axis.set(title=f"Time of loss + gradient, {results.threads} threads", ylabel="time per step")
    ticker: Any = require("matplotlib.ticker")
    axis.yaxis.set_major_locator(ticker.LogLocator(base=10))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: readable_seconds(value)))


def _draw_memory(axis: Any, results: Results) -> None:
    _draw_cost(axis, results, "extra_bytes")
    axis.set(title="Peak memory of loss + gradient", ylabel="beyond the inputs")
    ticker: Any = require("matplotlib.ticker")
    axis.yaxis.set_major_locator(ticker.LogLocator(base=4))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: readable_bytes(value)))


def _draw_cost(axis: Any, results: Results, what: str) -> None:
    ticker: Any = require("matplotlib.ticker")
    batches = [point.batch for point in results.points]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for side in (PLAIN, OURS):
        known = [
            (p.batch, getattr(p, what)[side]) for p in results.points if side in getattr(p, what)
        ]
        if known:
            axis.plot(
                *zip(*known, strict=True), _MARKERS[side] + "-", color=_COLORS[side], lw=2.0, ms=6,
                label=side,
            )  # fmt: skip
    _mark_skipped(axis, results, 0.62 if what == "seconds" else 0.8)
    _mark_gap(axis, results, what)
    axis.set_xlim(batches[0] * 0.8, batches[-1] * 1.4)
    axis.set_xticks(batches)
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.0f}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set_xlabel(f"batch (synthetic embeddings: 2 x batch rows of {DIM}, fp32)")
    axis.grid(True, which="major")
    axis.legend(loc="upper left")


def _mark_skipped(axis: Any, results: Results, height: float) -> None:
    skipped = [p.batch for p in results.points if PLAIN in p.skipped]
    if skipped:
        axis.axvspan(skipped[0] / 2**0.5, skipped[-1] * 2, color=_COLORS[PLAIN], alpha=0.10, lw=0)
        axis.text(
            skipped[0] / 1.26, height, f"{PLAIN} skipped", transform=axis.get_xaxis_transform(),
            rotation=90, ha="center", va="center", fontsize=8.5, color="#a85f14",
        )  # fmt: skip


def _mark_gap(axis: Any, results: Results, what: str) -> None:
    """Write the ratio of the two sides where both ran at the largest batch."""
    both = [p for p in results.points if all(side in getattr(p, what) for side in SIDES)]
    if not both:
        return
    values = getattr(both[-1], what)
    low, high = values[OURS], values[PLAIN]
    if not low or high <= low:
        return
    readable = readable_seconds if what == "seconds" else readable_bytes
    axis.annotate(
        "", xy=(both[-1].batch, low), xytext=(both[-1].batch, high),
        arrowprops={"arrowstyle": "<->", "color": "#5b616b", "shrinkA": 5, "shrinkB": 5},
    )  # fmt: skip
    ratio = high / low
    text = f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x"
    # The curves of time lie close: the words go below them.
    below = what == "seconds"
    axis.text(
        both[-1].batch / 1.12, 0.06 if below else low**0.68 * high**0.32,
        f"{text} at {both[-1].batch}:\n{readable(high)}\nto {readable(low)}",
        transform=axis.get_xaxis_transform() if below else axis.transData,
        ha="right", va="bottom" if below else "center", fontsize=9, color="#3a3f47",
    )  # fmt: skip


def _draw_clusters(figure: Any, results: Results) -> None:
    rand = {space: found.fits[OURS].rand for space, found in results.clusterings.items()}
    figure.suptitle(
        f"k-means of the {EMBEDDINGS}, without labels: each cluster's mean image, most frequent "
        f"digit and its share (adjusted Rand index {rand[EMBEDDINGS]:.2f}; "
        f"of the {PIXELS} {rand[PIXELS]:.2f})",
        fontsize=11.5,
        fontweight="bold",
    )
    axes = figure.subplots(1, len(results.portraits), squeeze=False)[0]
    for axis, portrait in zip(axes, results.portraits, strict=True):
        axis.imshow(portrait.image.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0)
        axis.set_title(f"{portrait.digit}: {readable_share(portrait.purity)}", fontsize=10.5, pad=5)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
        axis.spines[:].set_color("#c9ccd2")
