"""What pair_softmax's weights are, for whichever way their products are taken."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_fast.backends.triton import pair_softmax_kernels as kernels

ROWS, BOTH, MIRROR = (side.value for side in (kernels.ROWS, kernels.BOTH, kernels.MIRROR))


@dataclass(frozen=True)
class Weights:
    """W_ij = row_i exp(s_ij - row_lse_i) + column_j exp(s_ij - column_lse_j), 0 where excluded.

    Of a symmetric S, column_j is folded into column_lse_j (MIRROR), and must not be negative.
    """

    sides: int  # ROWS: the first term alone. BOTH. MIRROR
    row_lse: Tensor  # [N], no -inf
    row: Tensor  # [N]
    column_lse: Tensor | None = None  # [M], no -inf
    column: Tensor | None = None  # [M]
    bound: Tensor | None = None  # [], what no W_ij exceeds; None is 2

    @property
    def largest(self) -> Tensor:
        """What no W_ij exceeds, []."""
        return self.row.new_full((), 2.0) if self.bound is None else self.bound


def without_empty(weight: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and its log-sum-exp, both 0 where nothing was summed (exp(s + inf) is inf)."""
    empty = lse == -torch.inf
    return weight.float().masked_fill(empty, 0.0), lse.masked_fill(empty, 0.0)
