"""measured.json: rows that were measured on a card and go before those that the tables begin with.

One file for all tables, what ``python -m benchmarks.tune`` writes; the first name of a row's key
says which table it is of.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("measured.json")

Key = tuple[str, str, int, str]


def _names(first: str) -> tuple[str, ...]:
    return (first, "dtype", "depth", "architecture")


def as_text(tables: Mapping[str, Mapping[Key, Any]]) -> str:
    """The tables' rows as JSON, one to a line, so that a new measurement reads as a diff."""
    rows = (
        json.dumps(dict(zip(_names(first), key, strict=True)) | asdict(table[key]))
        for first, table in tables.items()
        for key in sorted(table)
    )
    return "[\n" + ",\n".join(rows) + "\n]\n"


def from_text(text: str, first: str) -> dict[Key, dict[str, Any]]:
    """The rows that ``as_text`` wrote of the table whose keys begin with ``first``."""
    table: dict[Key, dict[str, Any]] = {}
    for row in json.loads(text):
        if first in row:
            kind, dtype, depth, architecture = (row.pop(name) for name in _names(first))
            table[kind, dtype, depth, architecture] = row
    return table
