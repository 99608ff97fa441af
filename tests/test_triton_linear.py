"""The kernel of linear_reconstruction compiled for cards, and run on one where it is here.

The interpreter's checks are in interpreted_linear.py, which test_triton_pair_softmax.py runs.
"""

from __future__ import annotations

import pytest
import test_linear_reconstruction as of
import torch
from compile_triton_linear import cases
from compiled_reports import assert_within_limits, compiled_reports
from plain_reconstruction import KINDS

from ssl_fast.backends import triton

pytest.importorskip("triton")

CASES = cases()


@pytest.fixture(scope="module")
def compiled():
    """Every case's report, compiled once."""
    with compiled_reports("compile_triton_linear") as reports:
        yield reports


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_compiles_clean(compiled, case):
    assert_within_limits(compiled[case.name], case)


def test_refuses_with_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = triton.refuses("linear_reconstruction", "cuda", torch.float64, (8, 8, 8))
    assert "not float64" in reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(33, 20, 50), (300, 128, 784), (1000, 512, 3000)], ids=str)
def test_on_a_card(shape, dtype):
    """The compiled kernel against the formula in float64, at the table's own tile sizes."""
    if triton.refuses("linear_reconstruction", "cuda", dtype, shape):
        pytest.skip("this GPU is refused")
    inputs = of.inputs_of(shape, dtype)
    for kind in KINDS:
        found = of.value_and_grads(*(x.cuda() for x in inputs), kind=kind, backend="triton")
        of.assert_agrees([x.cpu() for x in found], of.exact_of(*inputs, kind=kind), dtype)
