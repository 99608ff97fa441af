"""The second step's picture: what autoencoders make of images, and what they are good for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssl_fast.demo.data import CLASSES
from ssl_fast.demo.extras import require
from ssl_fast.demo.picture import STYLE
from ssl_fast.demo.reconstruction import AUTOENCODER, MASKED, PER_CLASS, PIXELS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ssl_fast.demo.reconstruction import Reconstructions

_TITLES = ("image", "hidden", "filled in")


def draw(found: Reconstructions, path: Path) -> None:
    """Write the picture; the format follows the file's ending."""
    figure_module: Any = require("matplotlib.figure")
    matplotlib: Any = require("matplotlib")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(figsize=(15.5, 8.6), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(5.0, 3.6))
        left, middle, right = upper.subfigures(1, 3)
        _draw_rows(left, found.coded, ("image", "from its code"), "Autoencoder 64 - 32 - 64")
        _draw_rows(middle, found.filled_digits, _TITLES, "Masked autoencoder, half hidden")
        _draw_rows(right, found.filled_photographs, _TITLES, "On photographs, 3 of 4 hidden")
        axes = lower.subplots(1, 2)
        _draw_scores(axes[0], found)
        _draw_tunings(axes[1], found)
        figure.suptitle(
            "Reconstruction of scikit-learn's digits (not trained on these) and photographs",
            fontsize=13.5,
            fontweight="bold",
        )
        figure.savefig(path, dpi=130)


def _draw_rows(figure: Any, rows: tuple[Tensor, ...], titles: tuple[str, ...], title: str) -> None:
    figure.suptitle(title, fontsize=11.5, fontweight="bold")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, images, name in zip(axes, rows, titles, strict=True):
        for axis, image in zip(line, images, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            if pixels.shape[2] == 1:
                axis.imshow(pixels[..., 0], cmap="gray_r", vmin=0.0, vmax=1.0)
            else:
                axis.imshow(pixels)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)


def _draw_scores(axis: Any, found: Reconstructions) -> None:
    names = (PIXELS, AUTOENCODER, MASKED)
    bars = axis.bar(names, [100 * found.scores[name].probe for name in names], 0.5, color="#1f66b0")
    axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axis.set(
        title=f"Linear probe of frozen features, {PER_CLASS * CLASSES} labels",
        ylabel="test accuracy (%)",
        ylim=(0, 108),
    )


def _draw_tunings(axis: Any, found: Reconstructions) -> None:
    for place, tuning in enumerate(found.tunings):
        scores = [100 * score for score in tuning.accuracies]
        axis.plot([place] * len(scores), scores, "o", color="#1f66b0", alpha=0.6)
        mean = sum(scores) / len(scores)
        axis.plot([place - 0.2, place + 0.2], [mean, mean], color="#e08a2e", lw=2.5)
        axis.text(place + 0.24, mean, f"{mean:.1f}", va="center", fontsize=9)
    axis.set(
        title=f"Fine-tuned from {PER_CLASS * CLASSES} labels, one dot a draw of them",
        ylabel="test accuracy (%)",
        xlim=(-0.5, len(found.tunings) - 0.3),
        xticks=range(len(found.tunings)),
        xticklabels=[tuning.start for tuning in found.tunings],
    )
    axis.grid(True, axis="y")
