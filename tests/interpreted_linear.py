"""Triton's linear_reconstruction in Triton's interpreter.

Run as interpreted_pair_softmax.py is. The inputs and what is asked of the results are those of
test_linear_reconstruction.py and test_linear_reconstruction_autograd.py.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

import test_linear_reconstruction as of
import test_linear_reconstruction_autograd as of_autograd
from plain_reconstruction import KINDS

# numpy warns where a GPU says nothing: inf - inf and 0 / 0 are results here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3)], ids=str)
@pytest.mark.parametrize("kind", ["mse", "bce_with_logits"])
def test_values_and_gradients(kind, shape, dtype, poisoned_memory):
    of.test_values_and_gradients("triton", shape, kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_several_tiles(kind):
    of.test_values_and_gradients("triton", (70, 33, 70), kind, torch.float32)


@pytest.mark.parametrize("kind", ["mse", "bce_with_logits"])
def test_options(kind):
    for weight_of, mask_of in ((None, "rows"), ("rows", "elements"), ("elements", None)):
        of.test_weights_and_masks("triton", weight_of, mask_of, kind, "mean")
    of.test_reduction_none_with_any_gradient("triton", torch.float32, kind)


def test_edges(dtype):
    of.test_pos_weight("triton", dtype)
    of.test_targets_of_other_dtypes("triton", dtype)
    of.test_layouts("triton", dtype)
    of_autograd.test_second_backward_and_no_grad("triton")


@pytest.mark.parametrize("shape", of.EMPTY, ids=str)
def test_empty(shape):
    of.test_empty("triton", shape)
