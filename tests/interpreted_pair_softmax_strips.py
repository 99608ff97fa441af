"""The gradients of Triton's pair_softmax once more, by strips of weights: no depth is fused.

Run as interpreted_pair_softmax.py is, whose depths are fused up to 128.
"""

from __future__ import annotations

import pytest
from interpreted_pair_softmax import (  # noqa: F401
    test_expectation_in_sixteen_bits,
    test_loss_gives_what_is_needed,
    test_loss_in_batch,
    test_only_what_is_needed,
    test_sweep_in_sixteen_bits,
    test_symmetric,
    test_symmetric_loss,
)
from interpreted_pair_softmax_limits import (  # noqa: F401
    test_cutting_changes_nothing,
    test_every_row_ignored,
    test_half_has_the_range_for_any_incoming_gradient,
    test_half_has_the_range_for_any_norm,
    test_ids,
    test_large_scale,
    test_nothing_outside_is_read_or_changed,
    test_small_loss_keeps_its_gradient,
)

from ssl_fast.backends.triton import choice

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _no_depth_is_fused(monkeypatch):
    monkeypatch.setattr(choice, "INTERPRETED_DEPTH", 0)
