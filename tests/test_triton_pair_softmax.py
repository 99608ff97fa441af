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
from ssl_fast.backends.triton import choice, tuning

HERE = Path(__file__).parent
SIZES = (64, 64, 16)


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
    n, m, d = shape
    query, key = features(n, d, dtype=dtype).cuda(), features(m, d, dtype=dtype).cuda()
    scale, bias = torch.tensor(10.0, device="cuda"), torch.tensor(-5.0, device="cuda")
    rows, columns = (torch.rand(size, device="cuda") * 2 for size in (n, m))
    ids = [torch.arange(size, device="cuda") % 50 for size in (n, m)]
    ids[0][7] = ids[1][5] = -(2**63)
    sweep = (query, key, rows, columns, None, None, [0, 3])
    with_ids = (*sweep[:4], *ids, [0])
    own = (query, scale, rows, ids[0], n // 2)
    exact = dispatch.load("reference", "pair_softmax")
    lse = [exact.pair_softmax(*widened(sweep), True)[i].float() for i in (0, 2)]
    own_lse = exact.pair_softmax_symmetric(*widened(own))[0].float()
    sigmoid = (query, key, 10.0 * rows, columns, bias, rows, 0)
    calls = [
        ("pair_softmax", (*sweep, True)),
        ("pair_softmax", (*with_ids, True)),
        ("pair_softmax_backward", (*sweep, *lse, rows, columns, -rows, True, True)),
        ("pair_softmax_expectation", with_ids),
        ("pair_softmax_symmetric", own),
        ("pair_softmax_symmetric_backward", (*own, own_lse, rows - 1.0)),
        ("pair_softmax_loss", (query, None, key, scale, None, None, [0], True, True, False, True)),
        ("pair_softmax_symmetric_loss", (query[: n // 2 * 2], scale, True, True)),
        ("pair_sigmoid", (*sigmoid, True, True)),
        ("pair_sigmoid", (*sigmoid, False, False)),
    ]
    for name, given in calls:
        op = "pair_sigmoid" if name == "pair_sigmoid" else "pair_softmax"
        compiled, reference = (dispatch.load(x, op) for x in ("triton", "reference"))
        exact_results = getattr(reference, name)(*widened(given))
        plain = getattr(reference, name)(*given)
        for out, e, p in zip(getattr(compiled, name)(*given), exact_results, plain, strict=True):
            assert_near(out, e, dtype, plain=p, what=name)


def widened(given):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given
    ]


def test_refuses_with_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cases = [
        ("no_such_op", "cuda", torch.float32, SIZES, "no kernel for no_such_op"),
        ("pair_softmax", "cuda", torch.float64, SIZES, "not float64"),
        ("pair_sigmoid", "cuda", torch.float64, SIZES, "not float64"),
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
        for op in tuning.OPS:
            for architecture in tuning.ARCHITECTURES:
                for depth in (1, 64, 65, 256, 257, 4096):
                    for ids in (False, True):
                        config = tuning.lookup(op, dtype, depth, architecture, ids=ids)
                        assert config.block_rows % 16 == config.block_columns % 16 == 0
                        assert config.source
                        assert config.date


def test_rows_are_found_by_depth_and_frozen():
    narrow = tuning.lookup("sweep", torch.bfloat16, 64, "sm_90")
    wide = tuning.lookup("sweep", torch.bfloat16, 1024, "sm_90")
    assert narrow != wide
    # ids have a tile of their own where they need one, at the same depth
    assert tuning.lookup("sweep", torch.bfloat16, 64, "sm_90", ids=True) == narrow
    assert tuning.lookup("sweep", torch.bfloat16, 1024, "sm_90", ids=True) != wide
    with pytest.raises(KeyError, match="no_such_op has no row"):
        tuning.lookup("no_such_op", torch.bfloat16, 64, "sm_90")
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


def test_what_is_fused_has_a_tile():
    kinds = set()
    for (kind, name, bucket, architecture), chosen in choice.TABLE.items():
        kinds.add(kind)
        dtype = getattr(torch, name)
        for op in ("fused", "flash"):
            assert tuning.lookup(op, dtype, bucket, architecture).block_depth == bucket
        assert chosen.source
        assert chosen.date
        for n in (16, 2**15):
            fused = n * n <= chosen.most_pairs
            assert choice.is_fused(kind, dtype, (n, n, bucket - 1), architecture) is fused
    assert kinds == set(choice.KINDS)


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "fused"),
    [
        ("both_sides", torch.bfloat16, (2**15, 2**15, 64), True),
        ("both_sides", torch.bfloat16, (2**15, 2**15, 128), False),
        ("both_sides", torch.bfloat16, (16, 16, 129), False),
        ("both_sides", torch.float32, (2**11, 2**11, 64), True),
        ("both_sides", torch.float32, (2**11, 2**11 + 1, 64), False),
        ("both_sides_and_softmaxes", torch.bfloat16, (2**12, 2**12, 128), True),
        ("both_sides_and_softmaxes", torch.bfloat16, (2**15, 2**15, 128), False),
        ("one_side", torch.float16, (2**15, 2**20, 64), True),
        ("one_side", torch.float32, (16, 16, 65), False),
    ],
    ids=str,
)
def test_what_is_fused(kind, dtype, shape, fused):
    assert choice.is_fused(kind, dtype, shape, "sm_90") is fused
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.EVERY_SIZE.most_pairs = 1
