"""The kernels that walk over memory compiled for cards, and run on one where it is here.

The interpreter's checks are in interpreted_mae.py and interpreted_reconstruction.py, which
test_triton_pair_softmax.py runs.
"""

from __future__ import annotations

import pytest
import test_kl_divergence as of_kl
import test_l2_sp as of_l2_sp
import test_mae as of_mae
import test_reconstruction as of_reconstruction
import torch
from compile_triton_mae import cases
from compiled_reports import compiled_reports
from plain_reconstruction import KINDS

import ssl_fast
from ssl_fast.backends import triton

CASES = cases()


@pytest.fixture(scope="module")
def compiled():
    """Every case's report, compiled once."""
    with compiled_reports("compile_triton_mae") as reports:
        yield reports


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_compiles_clean(compiled, case):
    report = compiled[case.name]
    assert report["spilled"] == 0, report
    assert report["shared"] <= 4096, report
    assert report["registers"] <= 128, report


def test_refuses_with_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for op in ("mae", "kl_divergence", "l2_sp", "reconstruction"):
        assert "not float64" in triton.refuses(op, "cuda", torch.float64, (1,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(3, 9, 33), (8, 196, 768), (2, 3, 5000)], ids=str)
def test_on_a_card(shape, dtype):
    """The compiled kernels against the formulas in float64."""
    if triton.refuses("mae", "cuda", dtype, (1,)):
        pytest.skip("this GPU is refused")
    inputs = of_mae.inputs_of(shape, dtype)
    found = of_mae.value_and_grad(*(x.cuda() for x in inputs), backend="triton")
    of_mae.assert_agrees([x.cpu() for x in found], of_mae.exact_of(*inputs), dtype)
    inputs = of_kl.inputs_of(shape, dtype)
    found = of_kl.value_and_grads(*(x.cuda() for x in inputs), backend="triton")
    of_kl.assert_agrees([x.cpu() for x in found], of_kl.exact_of(*inputs), dtype)
    for kind in KINDS:
        x, t = of_reconstruction.inputs_of(kind, shape, dtype)
        found = of_reconstruction.value_and_grad(x.cuda(), t.cuda(), kind, backend="triton")
        exact = of_reconstruction.exact_of(x, t, kind)
        of_reconstruction.assert_agrees([y.cpu() for y in found], exact, dtype)
    parameters, anchors = of_l2_sp.tensors_of([shape, *of_l2_sp.SHAPES], dtype)
    exact = of_l2_sp.exact_of(parameters, anchors)
    leaves = [p.detach().cuda().requires_grad_() for p in parameters]
    away = [a.cuda() for a in anchors]
    value = ssl_fast.l2_sp(leaves, away, of_l2_sp.WEIGHT, backend="triton")
    grads = torch.autograd.grad(value, leaves)
    of_l2_sp.assert_agrees(value.cpu(), [x.cpu() for x in grads], exact)
    value = ssl_fast.l2_sp(leaves, away, of_l2_sp.WEIGHT, accumulate=True, backend="triton")
    of_l2_sp.assert_agrees(value.cpu(), [p.grad.cpu() for p in leaves], exact)
