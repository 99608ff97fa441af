"""The picture: how many times as long as ssl_fast the other sides of each race take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.gpu.races import OURS
from benchmarks.plot import STYLES
from ssl_fast.demo.results import readable_seconds

if TYPE_CHECKING:
    from pathlib import Path

COLOURS = {
    "eager torch": STYLES["eager torch"][0],
    "torch.compile": STYLES["torch.compile"][0],
    OURS: STYLES["ssl_fast triton"][0],
}
OTHER_COLOURS = ("#b0a24a", "#8a7d2e", "#5b8fb0", "#a05a7a", "#777777")


def draw(document: dict[str, Any], path: Path) -> bool:
    """Write the picture; False where matplotlib is missing or no side was timed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no picture: matplotlib is missing (pip install ssl_fast[bench])")
        return False
    races = {
        found["name"]: found["values"]["seconds"]
        for found in document["findings"]
        if OURS in found["values"].get("seconds", {})
    }
    if not races:
        return False
    sides = list(dict.fromkeys(name for seconds in races.values() for name in seconds))
    colours = dict(COLOURS)
    rest = (name for name in sides if name not in colours)
    colours |= dict(zip(rest, OTHER_COLOURS, strict=False))
    bars = sum(len(seconds) for seconds in races.values())
    figure = Figure(figsize=(11, 1.2 + 0.24 * bars + 0.2 * len(races)), layout="constrained")
    axis = figure.subplots()
    places, labels, place = [], [], 0.0
    for name, seconds in races.items():
        places.append(place + (len(seconds) - 1) / 2)
        labels.append(name.replace(", ", ",\n", 1))
        for side, value in seconds.items():
            ratio = value / seconds[OURS]
            axis.barh(place, ratio, 0.85, color=colours.get(side, OTHER_COLOURS[-1]))
            axis.text(ratio, place, f" {readable_seconds(value)}", va="center", fontsize=8)
            place += 1.0
        place += 0.8
    axis.set_yticks(places, labels, fontsize=8.5)
    axis.set_ylim(place - 0.8, -1.0)
    axis.axvline(1.0, color="#444444", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_xlabel("time, in times that of ssl_fast")
    axis.grid(True, axis="x", color="#e6e8ec")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    for side in sides:
        axis.barh(0, 0, color=colours.get(side, OTHER_COLOURS[-1]), label=side)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    found = document["machine"]
    figure.suptitle(
        f"ssl_fast and its peers   ({found.get('card') or found['cpu']}, torch {found['torch']}, "
        f"Triton {found['triton']})",
        fontsize=11,
        fontweight="bold",
    )
    figure.savefig(path, dpi=110)
    return True
