"""What a compile_triton_*.py says of its cases, in a process where Triton doesn't interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ssl_fast

HERE = Path(__file__).parent


def compiled_reports(script, *names):
    """The report of every case, or of those named, by name."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # The package that this process tests, wherever it was found, and these modules.
    places = (Path(ssl_fast.__file__).parents[1], HERE)
    environment["PYTHONPATH"] = os.pathsep.join(str(place) for place in places)
    run = subprocess.run(
        [sys.executable, str(HERE / script), *names],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)
