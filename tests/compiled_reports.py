"""What compile_triton.py says of a module's cases, and the limits that a report is held against."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tuned_cases import config_of

import ssl_fast

HERE = Path(__file__).parent
# What a block may have: the opt-in limits of A100, RTX 40, H100 and B200, and AMD's LDS.
SHARED_KB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}


class Reports:
    """The reports of a module's cases by name, each read when it is first asked for."""

    def __init__(self, process, errors):
        self.process = process
        self.errors = errors
        self.found = {}

    def __getitem__(self, name):
        while name not in self.found:
            line = self.process.stdout.readline()
            if not line:
                self.errors.seek(0)
                pytest.fail(f"no report of {name}: {self.errors.read()[-4000:]}")
            self.found |= json.loads(line)
        return self.found[name]


@contextlib.contextmanager
def compiled_reports(module):
    """Compiles the module's cases in a process where Triton doesn't interpret."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # The package that this process tests, wherever it was found, and these modules.
    places = (Path(ssl_fast.__file__).parents[1], HERE)
    environment["PYTHONPATH"] = os.pathsep.join(str(place) for place in places)
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as errors:
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        process = subprocess.Popen(
            [sys.executable, str(HERE / "compile_triton.py"), module],
            cwd=HERE.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            yield Reports(process, errors)
        finally:
            # with its workers, where not every report was asked for
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def assert_within_limits(report, case, spilled=0):
    """Fits the card, spills nothing and multiplies in the card's matrix units, fed from copies."""
    target, aligned = case.target, case.depth % 16 == 0
    assert report["shared"] <= SHARED_KB[target] * 1024, report
    # 255 is the most an instruction can name; with 256 AMD's card holds the 8 warps of a block
    assert report["registers"] <= (256 if target == "gfx942" else 255), report
    assert report["spilled"] <= spilled, report
    assert report["remarks"] == [], report
    instruction = MATRIX_INSTRUCTION[target]
    if target in ("sm_90", "sm_100") and config_of(case).block_rows < 64:
        instruction = "mma.sync"  # the newer ones take 64 rows at least
    assert instruction in report["instructions"], report
    if target.startswith("sm_") and aligned:
        assert "cp.async" in report["instructions"], report
