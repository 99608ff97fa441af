"""``python -m benchmarks.tune``: measure the tuning table's rows on the card at hand.

Writes a measured.json of this card's rows beside those that were measured on others. Put over
ssl_fast/backends/triton/measured.json, it takes effect; the run itself changes no table.
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
    from collections.abc import Callable

    from benchmarks.tune.rows import Key, Row
    from ssl_fast.backends.triton.tuning import Table


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
    from benchmarks.tune.rows import Row
    from ssl_fast.backends.triton import tuning

    place = Place()
    card = torch.cuda.get_device_properties(0)
    capability = None if torch.version.hip else torch.cuda.get_device_capability(0)
    shared = getattr(card, "shared_memory_per_block_optin", None) or float("inf")

    def row_for(key: Key) -> Row:
        call = calls.call_of(key, place.device, place.backend, calls.Sizes())
        return Row(key, call, races.clock(place), shared, place.synchronize)

    keys = keys_of(tuning.architecture_of(capability), options.only)
    print(f"{card.name}: {len(keys)} rows", flush=True)
    deadline = time.monotonic() + options.budget
    measured, wrong = tune(keys, row_for, card.name, deadline)
    write(measured, options.out)
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "measured.json", help="a file that isn't there yet"
    )
    parser.add_argument("--only", default="", help="the op of some rows: 'sweep'")
    parser.add_argument(
        "--budget", type=float, default=float("inf"),
        help="seconds after which no row is begun (default: all are)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def keys_of(architecture: str, only: str = "") -> list[Key]:
    """The rows of an architecture, of one op or of all, those for any depth last."""
    from ssl_fast.backends.triton import tuning

    keys = [key for key in tuning.TABLE if key[3] == architecture and only in ("", key[0])]
    return sorted(keys, key=lambda key: (key[0], key[1], key[2] or 2**31))


def tune(
    keys: list[Key], row_for: Callable[[Key], Row], source: str, deadline: float
) -> tuple[Table, list[str]]:
    """Search every row; gives those that were measured, and what was wrong."""
    measured: Table = {}
    wrong = []
    date = time.strftime("%Y-%m-%d")
    for key in keys:
        name = " ".join(map(str, key))
        if time.monotonic() > deadline:
            said(f"{name}: skipped, the run's time is spent")
            continue
        try:
            outcome = row_for(key).tuned()
        except Exception as error:
            wrong.append(said(f"{name}: {type(error).__name__}: {error}".splitlines()[0]))
        else:
            measured[key] = replace(outcome.best, source=source, date=date)
            said(_told(name, outcome))
            for tile, reason in outcome.refused.items():
                said(f"    {tile}: {reason}")
                if reason.startswith("WRONG"):
                    wrong.append(f"{name} {tile}: {reason}")
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


def write(measured: Table, path: Path) -> None:
    """The measured rows, with those of other cards that the package has."""
    from ssl_fast.backends.triton import tuning

    others = tuning.from_text(tuning.MEASURED.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tuning.as_text({**others, **measured}))
    print(f"wrote {path}; it takes effect as {tuning.MEASURED}")


if __name__ == "__main__":
    raise SystemExit(main())
