"""``python -m benchmarks``: run, print a table, and write JSON and a plot."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import RESULTS, ROOT

# The default run ends within ten minutes on two cores: a row that is under way when this many
# seconds have passed is finished, and the next ones are skipped. The last rows are short.
DEFAULT_BUDGET = 540.0
# The fewer rows first: time that runs out is missed by the sizes that say least.
BENCHMARKS = [ROOT / "benchmarks" / f"bench_{op}.py" for op in ("pair_sigmoid", "pair_softmax")]
TARGETS = ("all", "pair_softmax", "contrastive", "clustering", "reconstruction")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install ssl_fast[bench]", file=sys.stderr)
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.targets:
        from benchmarks import targets

        return targets.main(options.out, options.targets)
    from benchmarks import report

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        status = pytest.main(pytest_arguments(options, rows))
        if not rows.exists():
            return int(status) or 1
        document = json.loads(rows.read_text())
    report.write_all(document, options.out, options.suffix)
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else int(status)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--full", action="store_true", help="every size, dtype, pass and peer")
    what.add_argument(
        "--targets", nargs="?", const="all", choices=TARGETS,
        help="the ratios that a release must reach, of one set or of all",
    )  # fmt: skip
    what.add_argument("--smoke", action="store_true", help="tiny sizes: does all of it run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own count")
    parser.add_argument("--budget", type=float, help="seconds after which no row is begun")
    parser.add_argument("--only", default="", help="pytest's -k: 'nt_xent and native'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    options.grid = "full" if options.full else "smoke" if options.smoke else "default"
    if options.budget is None:
        options.budget = float("inf") if options.full else DEFAULT_BUDGET
    options.suffix = "" if options.device == "cpu" else f"_{options.device}"
    return options


def pytest_arguments(options: argparse.Namespace, rows: Path) -> list[str]:
    return [
        *map(str, BENCHMARKS),
        f"--rootdir={ROOT}",
        # Any other mode would put the checkout's ssl_fast before the installed one.
        "--import-mode=importlib",
        "-o", "addopts=",
        "-o", "faulthandler_timeout=0",
        "-p", "no:cacheprovider",
        "-W", "ignore::DeprecationWarning",
        "-W", "ignore:Benchmark fixture was not used",
        "-s", "-q", "--no-header", "--tb=line",
        "--benchmark-quiet",
        f"--grid={options.grid}",
        f"--device={options.device}",
        f"--budget={options.budget}",
        f"--rows-json={rows}",
        *(["-k", options.only] if options.only else []),
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
