"""Benchmarks of ssl_fast: ``python -m benchmarks`` in a checkout, against the installed package."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# The checkout's ssl_fast has no compiled module and would shadow the installed one: the checkout
# goes to the end of the path, where only ``benchmarks`` itself is found.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]
