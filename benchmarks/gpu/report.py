"""From findings to JSON, a page and a picture."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import card
from benchmarks.gpu.findings import FAILED, GROUPS, MISSED
from benchmarks.gpu.plot import draw

if TYPE_CHECKING:
    from pathlib import Path

NAME = "gpu"
HEADER = "| | status | what was found |\n|---|---|---|"
# Of the groups whose findings are many and alike, the page shows those that are no plain "ok".
LONG = ("correctness",)


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write gpu.json, gpu.md and gpu.png; the last where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    wrote = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    wrote[0].write_text(_json(document))
    wrote[1].write_text(markdown(document))
    picture = folder / f"{NAME}.png"
    if draw(document, picture):
        wrote.append(picture)
    return wrote


def _json(document: dict[str, Any]) -> str:
    """A finding to a line, so that a new run reads as a diff."""
    lines = ",\n".join("    " + json.dumps(finding) for finding in document["findings"])
    head = json.dumps({k: v for k, v in document.items() if k != "findings"}, indent=2)
    return f'{head[:-2]},\n  "findings": [\n{lines}\n  ]\n}}\n'


def markdown(document: dict[str, Any]) -> str:
    """The findings as a page."""
    took = f"Measured {document['date']} in {document['seconds']:.0f} s."
    lines = [f"{card.sentence(document['machine'])}. {took}", "", summary(document), ""]
    for group in GROUPS:
        findings = [found for found in document["findings"] if found["group"] == group]
        if not findings:
            continue
        shown = [x for x in findings if group not in LONG or x["status"] != "ok"]
        lines += [f"### {group}", "", f"{_counted(findings)}.", ""]
        if shown:
            lines += [HEADER, *map(_row, shown), ""]
    return "\n".join(lines)


def _row(finding: dict[str, Any]) -> str:
    status = finding["status"]
    loud = f"**{status}**" if status in {FAILED, MISSED} else status
    cells = (finding["name"], loud, finding["detail"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _counted(findings: list[dict[str, Any]]) -> str:
    counts = Counter(finding["status"] for finding in findings)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def summary(document: dict[str, Any]) -> str:
    """What it comes to, the bad news by name."""
    findings = document["findings"]
    lines = [f"{len(findings)} findings: {_counted(findings)}."]
    for status, word in ((FAILED, "Failed"), (MISSED, "Missed"), ("skipped", "Skipped")):
        names = [f"{x['group']}: {x['name']}" for x in findings if x["status"] == status]
        if names:
            lines.append(f"{word}: {'; '.join(names)}.")
    return "\n\n".join(lines)


def exit_code(document: dict[str, Any]) -> int:
    """1 where anything failed or a target is missed, as ``benchmarks --targets`` has it."""
    return int(any(found["status"] in {FAILED, MISSED} for found in document["findings"]))
