"""From rows to a table, a JSON file and a plot.

``python -m benchmarks.report benchmarks/results/pair_softmax.json`` prints the table again.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.plot import draw
from benchmarks.workloads import OPS
from ssl_fast.demo.results import readable_bytes, readable_seconds

HEADER = ("", "median", "against eager", "GFLOP/s", "of peak", "extra memory", "gradient error")
FOOTNOTE = (
    "Against eager: eager torch ran before every round of the row, and the medians of those rounds "
    "are compared. Extra memory: the peak beyond inputs and gradients."
)
BUSY = "A SHARE ABOVE 100%: the machine was busy while its peak was measured; run again."
WIDTHS = (34, 11, 15, 9, 9, 14, 16)


def write_all(document: dict[str, Any], folder: Path, suffix: str = "") -> None:
    """Write the files of every op that has rows: OP.json, OP.md and OP.png."""
    for op in OPS:
        rows = [row for row in document["rows"] if row["op"] == op]
        if rows:
            write(document | {"rows": rows}, folder, op + suffix)


def write(document: dict[str, Any], folder: Path, name: str) -> None:
    """Write NAME.json, NAME.md and NAME.png, and print the table."""
    # Rounded first, so that the table can be made again from the JSON, to the last digit.
    document = document | {"rows": [_rounded(row) for row in document["rows"]]}
    text = render(document)
    # One row of the table to a line, so that a new run reads as a diff.
    lines = ",\n".join("    " + json.dumps(row) for row in document["rows"])
    head = json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=2)
    (folder / f"{name}.json").write_text(f'{head[:-2]},\n  "rows": [\n{lines}\n  ]\n}}\n')
    (folder / f"{name}.md").write_text(markdown(document))
    print(text)
    wrote = ["json", "md"]
    if draw(document, folder / f"{name}.png"):
        wrote.append("png")
    print(f"\nwrote {', '.join(str(folder / f'{name}.{ending}') for ending in wrote)}")


def render(document: dict[str, Any]) -> str:
    """The table as plain text."""
    lines = [
        "",
        machine.sentence(document["machine"]),
        _ceilings(document),
        _footnote(document),
        "",
    ]
    header = "".join(f"{h:>{w}}" if h else " " * w for h, w in zip(HEADER, WIDTHS, strict=True))
    for group, rows in _groups(document):
        lines += [group, header]
        for cells in map(_cells, rows):
            if len(cells) == 2:
                lines.append(f"  {cells[0]:<{WIDTHS[0] - 2}}  {cells[1]}")
                continue
            values = "".join(f"{c:>{w}}" for c, w in zip(cells[1:], WIDTHS[1:], strict=True))
            lines.append(f"  {cells[0]:<{WIDTHS[0] - 2}}{values}")
        lines.append("")
    return "\n".join(lines)


def markdown(document: dict[str, Any]) -> str:
    """The table for a page."""
    lines = [machine.sentence(document["machine"]), "", _ceilings(document), ""]
    lines += [f"{_footnote(document)} Measured {document['date']}.", ""]
    for group, rows in _groups(document):
        lines += [f"### {group}", "", "| " + " | ".join(HEADER) + " |"]
        lines.append("|" + "---|" + "---:|" * (len(HEADER) - 1))
        for cells in map(_cells, rows):
            padded = [*cells, *[""] * (len(HEADER) - len(cells))]
            lines.append("| " + " | ".join(padded) + " |")
        lines.append("")
    return "\n".join(lines)


def _groups(document: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    # They ran in the order of what they tell; they are shown in the order of their sizes.
    rows = sorted(
        document["rows"],
        key=lambda r: (
            r["workload"], r["dtype"] != "fp32", r["pass"], r["dim"], r["rows"], r["columns"],
        ),
    )  # fmt: skip
    grouped = groupby(rows, key=lambda row: row["group"])
    return [(group, list(rows)) for group, rows in grouped]


def _cells(row: dict[str, Any]) -> list[str]:
    if row["status"] != "ok":
        word = row["status"] if row["status"] == "skipped" else row["status"].upper()
        return [row["side"], f"{word}: {row['reason']}"]
    extra, share, error = row["extra_mib"], row["share"], row["gradient_error"]
    return [
        row["side"],
        readable_seconds(row["seconds"]),
        "-" if row["ratio"] is None else f"{row['ratio']:.2f}x",
        f"{row['gflops']:.0f}",
        "-" if share is None else f"{100 * share:.0f}%",
        "-" if extra is None else readable_bytes(extra * 2**20),
        "-" if error is None else f"{error:.0e}",
    ]


def _ceilings(document: dict[str, Any]) -> str:
    names = {
        "fma_fp32": "FMA peak fp32 {} GFLOP/s",
        "fma_bf16": "FMA peak bf16 {} GFLOP/s",
        "product_fp32": "torch matmul fp32 {} GFLOP/s",
        "product_bf16": "torch matmul bf16 {} GFLOP/s",
        "copy_gb_s": "copy {} GB/s",
    }
    found = document["ceilings"]
    return "; ".join(text.format(found[name]) for name, text in names.items() if name in found)


def _footnote(document: dict[str, Any]) -> str:
    measured = [row for row in document["rows"] if row["status"] == "ok"]
    # In bf16 torch may use units that the instruction set chosen here lacks, and rightly pass it.
    if any(row["dtype"] == "fp32" and (row["share"] or 0.0) > 1.0 for row in measured):
        return f"{FOOTNOTE} {BUSY}"
    return FOOTNOTE


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text())))
