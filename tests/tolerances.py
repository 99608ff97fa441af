"""How far a result may be from the reference evaluated in float64: one table, one rule.

``|out - exact| <= 2 |plain - exact| + relative |exact| + absolute sqrt(elements)`` in the 2-norm.
``plain`` is what plain torch gives at the same dtype. Where a test has no plain result, the
relative term stands for it: about twice what plain torch loses by rounding its operands and logits
once (a product of unit rows, scale 1), so it is the stricter bound wherever logits are large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    relative: float
    absolute: float


TOLERANCES = {
    torch.float64: Tolerance(relative=1e-12, absolute=1e-13),
    torch.float32: Tolerance(relative=3e-6, absolute=1e-6),
    torch.float16: Tolerance(relative=1e-3, absolute=1e-4),
    torch.bfloat16: Tolerance(relative=8e-3, absolute=1e-3),
}


def assert_near(out, exact, dtype, plain=None, what="result"):
    """``out``, computed at ``dtype``, agrees with ``exact`` (float64), infinities included."""
    assert out.shape == exact.shape, f"{what}: shape {tuple(out.shape)}, not {tuple(exact.shape)}"
    out, exact = out.detach().double(), exact.detach().double()
    finite = torch.isfinite(exact)
    unequal = f"{what}: not the same infinities and NaN"
    assert torch.equal(torch.isnan(out), torch.isnan(exact)), unequal
    assert torch.equal(out[torch.isinf(exact)], exact[torch.isinf(exact)]), unequal
    out, exact = out[finite], exact[finite]
    tolerance = TOLERANCES[dtype]
    allowed = tolerance.relative * exact.norm() + tolerance.absolute * exact.numel() ** 0.5
    if plain is not None:
        allowed = allowed + 2 * (plain.detach().double()[finite] - exact).norm()
    error = (out - exact).norm()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} ({dtype})"
