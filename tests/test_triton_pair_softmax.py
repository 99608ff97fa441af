"""What the Triton backend refuses, its tuning table, and its kernels in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_near

import ssl_fast
from ssl_fast.backends import dispatch, triton
from ssl_fast.backends.triton import tuning

HERE = Path(__file__).parent
SIZES = (64, 64, 16)
OPS = ("sweep", "sweep_columns", "weights", "weights_mirror", "weights_moments")


def test_interpreted():
    """Every check of the interpreted_*.py files, in a process of its own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        # the package that this process tests, wherever it was found
        "PYTHONPATH": str(Path(ssl_fast.__file__).parents[1]),
    }
    run = subprocess.run(
        [*command, *map(str, sorted(HERE.glob("interpreted_*.py")))],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert "passed" in run.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(33, 50, 20), (300, 700, 128), (1000, 1500, 768)], ids=str)
def test_compiled(features, shape, dtype):
    """The compiled kernels against the reference in float64, at the table's own tile sizes."""
    if triton.refuses("pair_softmax", "cuda", dtype, shape):
        pytest.skip("this GPU is refused")
    compiled, reference = (dispatch.load(x, "pair_softmax") for x in ("triton", "reference"))
    n, m, d = shape
    query, key = features(n, d, dtype=dtype).cuda(), features(m, d, dtype=dtype).cuda()
    scale = torch.tensor(10.0, device="cuda")
    ones = [torch.ones(size, device="cuda") for size in (n, m)]
    sweep = (query, key, *ones, None, None, [0, 3])
    lse = [reference.pair_softmax(*widened(sweep), True)[i].float() for i in (0, 2)]
    calls = {
        "pair_softmax": (*sweep, True),
        "pair_softmax_backward": (*sweep, *lse, *ones, True, True),
        "pair_softmax_loss": (query, None, key, scale, None, None, [0], True, True, False, True),
        "pair_softmax_symmetric_loss": (query[: n // 2 * 2], scale, True, True),
    }
    for name, given in calls.items():
        exact = getattr(reference, name)(*widened(given))
        plain = getattr(reference, name)(*given)
        for out, e, p in zip(getattr(compiled, name)(*given), exact, plain, strict=True):
            assert_near(out, e, dtype, plain=p, what=name)


def widened(given):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given
    ]


def test_refuses_with_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cases = [
        ("nearest", "cuda", torch.float32, SIZES, "no kernel for nearest"),
        ("pair_softmax", "cuda", torch.float64, SIZES, "not float64"),
        ("pair_softmax", "cuda", torch.float32, (2**31, 8, 8), "32 bits"),
    ]
    for op, device_type, dtype, shape, reason in cases:
        assert reason in triton.refuses(op, device_type, dtype, shape)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_refuses_a_machine_without_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = {
        "cpu": "TRITON_INTERPRET=1",
        "cuda": "no CUDA device",
        "xpu": "not on xpu",
    }
    for device_type, reason in reasons.items():
        assert reason in triton.refuses("pair_softmax", device_type, torch.float32, SIZES)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        dispatch.resolve("pair_softmax", "cpu", torch.float32, SIZES, "triton")


def test_refuses_without_triton(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda _: None)
    assert triton.refuses("pair_softmax", "cuda", torch.float32, SIZES) == "triton is not installed"


def test_every_call_has_a_row():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for op in OPS:
            for architecture in tuning.ARCHITECTURES:
                for depth in (1, 64, 65, 256, 257, 4096):
                    config = tuning.lookup(op, dtype, depth, architecture)
                    assert config.block_rows % 16 == config.block_columns % 16 == 0
                    assert config.source
                    assert config.date


def test_rows_are_found_by_depth_and_frozen():
    narrow = tuning.lookup("sweep", torch.bfloat16, 64, "sm_90")
    wide = tuning.lookup("sweep", torch.bfloat16, 1024, "sm_90")
    assert narrow != wide
    with pytest.raises(dataclasses.FrozenInstanceError):
        narrow.warps = 1


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"), ((8, 6), "generic"), ((8, 9), "generic"), ((9, 0), "sm_90"),
        ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((12, 0), "generic"), (None, "generic"),
    ],
)  # fmt: skip
def test_architectures(capability, name):
    assert tuning.architecture_of(capability) == name
