"""Triton's mae, kl_divergence and l2_sp in Triton's interpreter.

Run as interpreted_pair_softmax.py is. The inputs and what is asked of the results are those of
test_mae.py, test_kl_divergence.py and test_l2_sp.py.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

import test_kl_divergence as of_kl
import test_l2_sp as of_l2_sp
import test_mae as of_mae
import test_mae_autograd as of_autograd

import ssl_fast

# numpy warns where a GPU says nothing: inf - inf and 0 / 0 are results here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TRITON = {"backend": "triton"}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("masked", [0.0, 0.6])
@pytest.mark.parametrize("shape", [(0, 4, 3), (1, 1, 2), (2, 5, 33), (1, 3, 1500)], ids=str)
def test_mae(shape, masked, norm_pix_loss, dtype, poisoned_memory):
    inputs = of_mae.inputs_of(shape, dtype, masked)
    found = of_mae.value_and_grad(*inputs, norm_pix_loss=norm_pix_loss, **TRITON)
    of_mae.assert_agrees(found, of_mae.exact_of(*inputs, norm_pix_loss), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 2, 2, 2, 2), (2, 3, 8, 12, 4, 4), (2, 5, 4, 6, 2, 3)])
def test_mae_of_images(shape):
    of_mae.test_images("triton", shape, torch.float32, torch.float32)


def test_mae_of_other_images_and_layouts():
    of_mae.test_images("triton", (2, 2, 6, 4, 3, 2), torch.bfloat16, torch.float32)
    of_mae.test_layouts("triton", torch.float32)


def test_mae_at_its_edges():
    of_mae.test_constant_patches("triton")
    of_mae.test_one_element_has_no_variance("triton")
    of_mae.test_weights_of_patches("triton")
    of_autograd.test_gradients_reach_only_what_asks("triton", (True, True))
    for value in (torch.nan, torch.inf):
        of_mae.test_not_finite_values_propagate("triton", value, 0)
        of_mae.test_not_finite_values_propagate("triton", value, 1)


@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (1024,), (2500,)], ids=str)
def test_kl_divergence(shape, dtype, poisoned_memory):
    inputs = of_kl.inputs_of(shape, dtype)
    of_kl.assert_agrees(of_kl.value_and_grads(*inputs, **TRITON), of_kl.exact_of(*inputs), dtype)


def test_kl_divergence_at_its_edges():
    for size in (1e-6, 1e-2, 1.1):
        of_kl.test_near_the_standard_normal("triton", size)
    of_kl.test_large_log_variances_stay_finite("triton")
    of_kl.test_only_what_is_needed("triton")
    for value in (torch.nan, torch.inf, -torch.inf):
        of_kl.test_not_finite_values_propagate("triton", value, 0)
        of_kl.test_not_finite_values_propagate("triton", value, 1)


@pytest.mark.parametrize("shapes", [[(3, 5), (0,), (), (2048,), (2049,)], [(0,)], [()]], ids=len)
def test_l2_sp(shapes, dtype, poisoned_memory):
    parameters, anchors = of_l2_sp.tensors_of(shapes, dtype)
    exact = of_l2_sp.exact_of(parameters, anchors)
    value = ssl_fast.l2_sp(parameters, anchors, of_l2_sp.WEIGHT, **TRITON)
    of_l2_sp.assert_agrees(value, torch.autograd.grad(value, parameters), exact)


def test_l2_sp_accumulates(dtype):
    """As test_l2_sp.py's own, where the interpreter can say how fp32 becomes a half: it cuts."""
    shapes = [(3, 5), (0,), (), (2048,), (2049,), (7,)]
    of_l2_sp.test_accumulate("triton", shapes, dtype)
    of_l2_sp.test_layouts("triton", torch.float32)
    of_l2_sp.test_mixed_dtypes("triton")


def test_same_bits_again(dtype):
    first, second = (
        [
            *of_mae.value_and_grad(*of_mae.inputs_of((2, 5, 33), dtype), **TRITON),
            *of_kl.value_and_grads(*of_kl.inputs_of((2500,), dtype), **TRITON),
        ]
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
