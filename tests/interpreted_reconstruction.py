"""Triton's reconstruction in Triton's interpreter.

Run as interpreted_pair_softmax.py is. The inputs and what is asked of the results are those of
test_reconstruction.py and test_reconstruction_autograd.py.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

import test_reconstruction as of
import test_reconstruction_autograd as of_autograd
from plain_reconstruction import KINDS, inputs_of

# numpy warns where a GPU says nothing: log(0), inf - inf and 0 / 0 are results here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (1024,), (2500,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, shape, reduction, dtype, poisoned_memory):
    x, t = inputs_of(kind, shape, dtype)
    found = of.value_and_grad(x, t, kind, reduction, 2.0, backend="triton")
    of.assert_agrees(found, of.exact_of(x, t, kind, reduction, 2.0), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_options(kind):
    of.test_weights_and_masks("triton", kind, (2, 3, 70), "mean", torch.float32)
    of.test_bytes_as_targets("triton", kind, torch.float32)
    of.test_layouts("triton", kind)


def test_edges():
    for parameter in (1e-3, 30.0):
        for kind in ("smooth_l1", "huber"):
            of.test_parameters("triton", kind, parameter, torch.float32)
    for shape in ((5,), (3, 1), (2, 3, 5)):
        of.test_pos_weight("triton", shape, torch.float32)
    of.test_the_input_as_its_own_weight("triton")
    of.test_small_losses_keep_their_digits("triton")
    of.test_small_numbers_in_bce("triton")
    for kind in KINDS:
        if kind != "bce":
            of.test_nan_and_infinity_are_as_in_torch("triton", kind)
    of_autograd.test_in_place_is_honest("triton")
    of_autograd.test_nothing_counts("triton")


def test_same_bits_again(dtype):
    x, t = inputs_of("huber", (2500,), dtype)
    first, second = (of.value_and_grad(x, t, "huber", backend="triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
