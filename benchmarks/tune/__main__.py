"""``python -m benchmarks.tune``: measure the rows of Triton's tables on the card at hand.

First the tiles of tuning.py, then, with those, up to which sizes choice.py has gradients fused.
Writes a measured.json of this card's rows beside those that were measured on others. Put over
ssl_fast/backends/triton/measured.json, it takes effect; the run itself changes no file there.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import RESULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.tune.choices import ChoiceRow
    from benchmarks.tune.rows import Key, Row
    from ssl_fast.backends.triton import choice, tuning


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        print("error: torch finds no CUDA device, and this needs one", file=sys.stderr)
        return 2
    if options.out.exists():
        print(f"error: {options.out} exists; give another --out", file=sys.stderr)
        return 1
    from benchmarks.gpu import races
    from benchmarks.gpu.findings import Place
    from benchmarks.tune import calls
    from benchmarks.tune.choices import ChoiceRow
    from benchmarks.tune.rows import Row
    from ssl_fast.backends.triton import choice, tuning

    place = Place()
    card = torch.cuda.get_device_properties(0)
    capability = None if torch.version.hip else torch.cuda.get_device_capability(0)
    shared = getattr(card, "shared_memory_per_block_optin", None) or float("inf")

    def row_for(key: Key) -> Row:
        call = calls.call_of(key, place.device, place.backend, calls.Sizes())
        return Row(key, call, races.clock(place), shared, place.synchronize)

    def choice_for(key: Key) -> ChoiceRow:
        def call_for(batch: int) -> calls.Call:
            sizes = calls.Sizes(batch=batch)
            return calls.call_of_kind(key, place.device, place.backend, sizes)

        return ChoiceRow(key, call_for, races.clock(place), place.synchronize)

    architecture = tuning.architecture_of(capability)
    tiles = keys_of(tuning.TABLE, architecture, options.only)
    choices = keys_of(choice.TABLE, architecture, options.only)
    print(f"{card.name}: {len(tiles)} tiles, {len(choices)} choices", flush=True)
    deadline = time.monotonic() + options.budget
    measured, wrong = tune(tiles, row_for, card.name, deadline)
    chosen: choice.Table = {}
    if answers():
        tuning.TABLE = {**tuning.TABLE, **measured}
        chosen, more = choose(choices, choice_for, card.name, deadline)
        wrong += more
    write(measured, chosen, options.out)
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "measured.json", help="a file that isn't there yet"
    )
    parser.add_argument("--only", default="", help="the op, or kind of sums, of some rows: 'sweep'")
    parser.add_argument(
        "--budget", type=float, default=float("inf"),
        help="seconds after which no row is begun (default: all are)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def keys_of(table: Mapping[Key, Any], architecture: str, only: str = "") -> list[Key]:
    """The rows of an architecture, of one op or of all, those for any depth last."""
    keys = [key for key in table if key[3] == architecture and only in ("", key[0])]
    return sorted(keys, key=lambda key: (key[0], key[1], key[2] or 2**31))


def tune(
    keys: list[Key], row_for: Callable[[Key], Row], source: str, deadline: float
) -> tuple[tuning.Table, list[str]]:
    """Search every row; gives those that were measured, and what was wrong."""

    def search(key: Key, name: str) -> tuple[tuning.Config, list[str]]:
        outcome = row_for(key).tuned()
        said(_told(name, outcome))
        wrong = []
        for tile, reason in outcome.refused.items():
            said(f"    {tile}: {reason}")
            if reason.startswith("WRONG"):
                wrong.append(f"{name} {tile}: {reason}")
        return outcome.best, wrong

    return _each(keys, search, source, deadline)


def choose(
    keys: list[Key], row_for: Callable[[Key], ChoiceRow], source: str, deadline: float
) -> tuple[choice.Table, list[str]]:
    """Measure each row's two ways; gives the rows that were measured, and what was wrong."""
    from ssl_fast.backends.triton.choice import Choice

    def cut(key: Key, name: str) -> tuple[Choice, list[str]]:
        found = row_for(key).crossing()
        said(f"{name}: fused up to {found.most_pairs} pairs")
        for batch, times in found.times.items():
            ways = times if isinstance(times, str) else _of_both(*times)
            said(f"    {batch} rows: {ways}")
        return Choice(found.most_pairs), []

    return _each(keys, cut, source, deadline)


def _of_both(fused: float, strips: float) -> str:
    return f"{fused * 1e3:.3f} ms fused, {strips * 1e3:.3f} ms by strips"


def _each(
    keys: list[Key],
    measure: Callable[[Key, str], tuple[Any, list[str]]],
    source: str,
    deadline: float,
) -> tuple[dict[Key, Any], list[str]]:
    """The rows measured and what was wrong; none is begun once time is up or the card is silent."""
    measured: dict[Key, Any] = {}
    wrong = []
    date = time.strftime("%Y-%m-%d")
    for key in keys:
        name = " ".join(map(str, key))
        if time.monotonic() > deadline:
            said(f"{name}: skipped, the run's time is spent")
            continue
        try:
            row, found = measure(key, name)
        except Exception as error:
            wrong.append(said(f"{name}: {type(error).__name__}: {error}".splitlines()[0]))
        else:
            measured[key] = replace(row, source=source, date=date)
            wrong += found
        if not answers():
            wrong.append(said(f"{name}: the card answers no more; no other row is begun"))
            break
    said(f"{len(measured)} of {len(keys)} rows measured; {len(wrong)} failures")
    return measured, wrong


def said(line: str) -> str:
    """The line, shown at once."""
    print(line, flush=True)
    return line


def answers() -> bool:
    """Whether the card still does: after an illegal access no launch of this process works."""
    import torch

    from benchmarks.gpu.findings import Place, healthy

    return healthy(Place("cuda" if torch.cuda.is_available() else "cpu"))


def _told(name: str, outcome: Any) -> str:
    from benchmarks.tune.search import tile

    timed = sum(not isinstance(found, str) for found in outcome.tried.values())
    return (
        f"{name}: {tile(outcome.best)}, {outcome.seconds * 1e3:.3f} ms, "
        f"{outcome.before / outcome.seconds:.3f}x of the present row, {timed} timed"
    )


def write(tiles: tuning.Table, choices: choice.Table, path: Path) -> None:
    """The measured rows, with those of other cards that the package has."""
    from ssl_fast.backends.triton import choice, measured, tuning

    shipped = measured.PATH.read_text()
    tables: dict[str, dict[Key, Any]] = {
        "op": {**tuning.from_text(shipped), **tiles},
        "kind": {**choice.from_text(shipped), **choices},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(measured.as_text(tables))
    print(f"wrote {path}; it takes effect as {measured.PATH}")


if __name__ == "__main__":
    raise SystemExit(main())
