"""The plot of a benchmark run: time and memory against rows, and shares of the peak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.workloads import WORKLOADS
from ssl_fast.demo.results import readable_bytes, readable_seconds

if TYPE_CHECKING:
    from pathlib import Path

# Side, colour, marker. Others are in the table.
STYLES = {
    "eager torch": ("#e08a2e", "s"),
    "eager torch (open_clip formula)": ("#c2571a", "s"),
    "eager torch (SupCon formula)": ("#e0b02e", "s"),
    "torch.compile": ("#8a5fb5", "D"),
    "info-nce-pytorch": ("#b0a24a", "v"),
    "pytorch-metric-learning": ("#b0a24a", "v"),
    "pytorch-metric-learning SupCon": ("#8a7d2e", "v"),
    "ssl_fast triton": ("#2b8a6e", "o"),
    "ssl_fast native": ("#1f66b0", "o"),
}
# In the chart of shares; the others do eager torch's work in eager torch's time.
BARS = tuple(
    side for side in STYLES if side.startswith(("eager torch", "torch.compile", "ssl_fast"))
)
TITLES = {name: work.title for name, work in WORKLOADS.items()}
DIM = 128
LEGEND_COLUMNS = 5


def draw(document: dict[str, Any], path: Path) -> bool:
    """Write the plot; False where matplotlib is missing or nothing was measured."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no plot: matplotlib is missing (pip install ssl_fast[bench])")
        return False
    rows = [row for row in document["rows"] if row["status"] == "ok"]
    workloads = [work for work in TITLES if any(row["workload"] == work for row in rows)]
    if not workloads:
        return False
    figure = Figure(figsize=(16, 4.9 * len(workloads) + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.02, hspace=0.03)
    axes = figure.subplots(len(workloads), 3, squeeze=False)
    for line, workload in zip(axes, workloads, strict=True):
        of_work = [row for row in rows if row["workload"] == workload]
        dim = DIM if any(row["dim"] == DIM for row in of_work) else of_work[0]["dim"]
        curves = [
            row
            for row in of_work
            if row["dim"] == dim and row["dtype"] == "fp32" and row["pass"] != "forward"
        ]
        # A queue grows while its batch stays.
        size = "columns" if len({row["rows"] for row in curves}) == 1 else "rows"
        what = f"{TITLES[workload]}, fp32, D = {dim}"
        _curves(line[0], curves, size, "seconds", f"Time, loss + gradient: {what}")
        _curves(line[1], curves, size, "extra_mib", f"Memory, loss + gradient: {what}")
        _shares(line[2], of_work, f"Share of the measured peak: {TITLES[workload]}")
    model = document["machine"].get("card") or document["machine"]["cpu"]
    figure.suptitle(
        f"ssl_fast and its peers   ({model}, {document['machine']['threads']} threads, "
        f"ISA {document['machine']['isa']}, torch {document['machine']['torch']})",
        fontsize=13,
        fontweight="bold",
    )
    handles = {}
    for axis in axes.flat:
        found = zip(*axis.get_legend_handles_labels(), strict=True)
        handles |= {label: handle for handle, label in found if label not in handles}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=LEGEND_COLUMNS,
        frameon=False, fontsize=10.5,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    return True


def _curves(axis: Any, rows: list[dict[str, Any]], size: str, what: str, title: str) -> None:
    from matplotlib import ticker

    readable = readable_seconds if what == "seconds" else lambda mib: readable_bytes(mib * 2**20)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for side, (color, marker) in STYLES.items():
        # A side with next to no extra memory is drawn at a mebibyte: zero has no logarithm.
        points = sorted(
            (row[size], row[what] if what == "seconds" else max(1.0, row[what]))
            for row in rows
            if row["side"] == side and row[what] is not None
        )
        if points:
            axis.plot(*zip(*points, strict=True), marker + "-", color=color, lw=2, ms=6, label=side)
    if not axis.lines:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
        return
    axis.set_title(title, fontsize=10.5, fontweight="bold")
    axis.set_xlabel(f"{size} of the similarity matrix")
    axis.set_ylabel("time of one step" if what == "seconds" else "beyond inputs and gradients")
    axis.set_xticks(sorted({row[size] for row in rows}))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.0f}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    if what == "extra_mib":
        axis.yaxis.set_major_locator(ticker.LogLocator(base=4))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: readable(value)))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.tick_params(labelsize=9)
    axis.grid(True, color="#e6e8ec")
    axis.spines[["top", "right"]].set_visible(False)


def _is_telling(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether a row's share is drawn: the sizes that say most, or all where there are few."""
    telling = WORKLOADS[row["workload"]].telling
    sizes = (telling,) if row["dim"] == DIM else (telling, 4096)
    return row["columns"] in sizes or len(rows) < 12


def _shares(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Bars for the groups of one size of each D."""
    sizes: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if _is_telling(row, rows) and row["share"] is not None and row["side"] in BARS:
            size = row["rows"], row["columns"], row["dim"], row["dtype"], row["pass"]
            sizes.setdefault(size, {})[row["side"]] = 100 * row["share"]
    if not sizes:
        axis.text(0.5, 0.5, "no measured ceiling", transform=axis.transAxes, ha="center")
        return
    groups = sorted(sizes, key=lambda size: (size[2], -size[1], size[4], size[3]))[:10]
    sides = [side for side in BARS if any(side in sizes[group] for group in groups)]
    height = 0.8 / len(sides)
    for index, side in enumerate(reversed(sides)):
        places = [row + (index - (len(sides) - 1) / 2) * height for row in range(len(groups))]
        shares = [sizes[group].get(side, 0.0) for group in groups]
        axis.barh(places, shares, height * 0.92, color=STYLES[side][0], label=side)
    short = {"forward": "forward", "forward+backward": "fwd+bwd"}
    labels = [
        f"{n} x {d if n == m else f'{m} x {d}'}, {dtype}\n{short[mode]}"
        for n, m, d, dtype, mode in groups
    ]
    axis.set_yticks(range(len(groups)), labels, fontsize=8.5)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10.5, fontweight="bold")
    axis.set_xlabel("share of the peak of fused multiply-adds (%)")
    # torch may use units that the peak doesn't count (AMX in bf16), and pass it.
    axis.set_xlim(0, max(100.0, 1.05 * max(max(shares.values()) for shares in sizes.values())))
    axis.grid(True, axis="x", color="#e6e8ec")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
