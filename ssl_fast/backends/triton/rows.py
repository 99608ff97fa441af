"""Work per row around the sweeps: norms, dot products, and the last step of a gradient."""

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import row_kernels
from ssl_fast.backends.triton.device import written_dtype

NORM_FLOOR = 1e-12
ROW_BLOCK = 8
DEPTH_BLOCK = 128


def inverse_norms(features: Tensor, normalize: bool) -> Tensor:
    """1/norm per row in fp32, 0 for a row of zeros; all 1 without normalisation."""
    if not normalize:
        return torch.ones(features.shape[0], device=features.device)
    norms = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    # NaN > floor is false, and a NaN row must not pass for a row of zeros
    return torch.where(norms <= NORM_FLOOR, 0.0, 1.0 / norms)


def _row_grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, ROW_BLOCK),)


def row_dots(left: Tensor, right: Tensor, shift: int = 0) -> Tensor:
    """<left_i, right_{(i + shift) mod N}> in fp32."""
    n, depth = left.shape
    dots = torch.empty(n, device=left.device)
    if n:
        row_kernels.row_dot_kernel[_row_grid(n)](
            left, right, dots, n, depth, left.stride(0), right.stride(0), shift,
            BLOCK_ROWS=ROW_BLOCK, BLOCK_DEPTH=DEPTH_BLOCK,
        )  # fmt: skip
    return dots


def finish_rows(
    features: Tensor,  # [N, D]
    inverse: Tensor,  # [N]
    scale: Tensor,  # []
    normalize: bool,
    sums: Tensor | None,  # [N, D] fp32
    restore: Tensor | None,  # [N]
    other: Tensor | None,  # [P, D]
    coefficient: Tensor | None,  # [N], or one for each of the first P rows with shift 0
    shift: int = 0,
    *,
    wrap: bool = False,
) -> tuple[Tensor, Tensor]:
    """The features' gradient, and per row its product with the features over the scale.

    Of t_i = restore_i sums_i + coefficient_i other_{i + shift}, both zero where missing (wrap: the
    index modulo N, which is P), the gradient is scale (t_i - inverse_i² <x_i, t_i> x_i), the last
    term with normalisation.
    """
    n, depth = features.shape
    gradient = torch.empty(n, depth, dtype=written_dtype(features), device=features.device)
    dots = torch.empty(n, device=features.device)
    if n:
        has_other = other is not None and coefficient is not None and len(other) > 0
        others = other if has_other and other is not None else features
        row_kernels.finish_rows_kernel[_row_grid(n)](
            inverse if sums is None else sums,
            inverse if restore is None else restore,
            others, inverse if coefficient is None else coefficient,
            features, inverse, scale, gradient, dots,
            n, others.shape[0], depth, others.stride(0), features.stride(0), shift,
            HAS_PRODUCT=sums is not None, HAS_RESTORE=restore is not None,
            HAS_OTHER=has_other, WRAP=wrap, PROJECT=normalize,
            BLOCK_ROWS=ROW_BLOCK, BLOCK_DEPTH=DEPTH_BLOCK,
        )  # fmt: skip
    return gradient.to(features.dtype), dots
