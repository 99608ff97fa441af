"""The gradient's sums over the weights: strips of W, written by a kernel, times K and Q.

W_ij are the derivatives of the loss by the logits. A strip of them is bounded in memory; the
products are the library's, and their sums over strips are kept in fp32. Nothing here reads a value
on the host.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import pair_softmax_kernels as kernels
from ssl_fast.backends.triton.device import accumulate_product, config_for, written_dtype
from ssl_fast.backends.triton.pair_softmax_sweep import Pairs, tile_arguments

STRIP_BYTES = 256 * 2**20
# A strip this tall still fills a card; where not all keys fit beside it, it is cut in columns too.
STRIP_ROWS = 1024
# fp16 operands are scaled to 2^14 at most: 2^-24 is their smallest step, 65504 their largest value.
HALF_TOP = 14

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


@dataclass(frozen=True)
class Products:
    """The sums over the weights, None or empty where not asked for."""

    query: Tensor | None  # [N, D] fp32: restore_query_i query_i = sum_j W_ij qs_i ks_j k_j
    key: Tensor | None  # [M, D] fp32: restore_key_j key_j = sum_i W_ij qs_i ks_j q_i
    restore_query: Tensor | None  # [N]; None is 1
    restore_key: Tensor | None  # [M]; None is 1
    row_moment: Tensor  # [N]: sum_j W_ij ks_j <q_i, k_j> (MIRROR: of the row term)
    column_moment: Tensor  # [M]: sum_i W_ij qs_i <q_i, k_j>


@dataclass(frozen=True)
class _Operand:
    """One side's features as a product takes them: factor_i x_i = mantissa_i rows_i / shift.

    bf16 and fp32 weights have the range to carry factor_i, and the features go in as they are.
    fp16 has not: the factor's power of two goes into a copy of the features, scaled as a whole to
    fp16's upper range, and only the mantissa, in [0.5, 1), into the weights.
    """

    rows: Tensor  # [N, D], power_i shift x_i
    mantissa: Tensor  # [N]
    power: Tensor | None  # [N]; None is 1
    shift: Tensor | None  # []; None is 1


def _operand(features: Tensor, factor: Tensor) -> _Operand:
    if features.dtype != torch.float16:
        return _Operand(features, factor, None, None)
    mantissa, exponent = torch.frexp(factor)
    power = torch.ldexp(torch.ones_like(factor), exponent)
    sizes = torch.linalg.vector_norm(features, torch.inf, dim=1, dtype=torch.float32)
    _, top = torch.frexp((sizes * power).amax())
    shift = torch.ldexp(power.new_ones(()), (HALF_TOP - top).clamp(-100, 100))
    scaled = torch.empty_like(features, memory_format=torch.contiguous_format)
    torch.mul(features, (power * shift)[:, None], out=scaled)
    return _Operand(scaled, mantissa, power, shift)


def _amplifier(weights: Weights) -> Tensor:
    """The power of two that brings fp16 weights to the upper end of their range."""
    bound = weights.bound
    if bound is None:
        bound = torch.full((), 2.0, device=weights.row.device)
    _, top = torch.frexp(bound)
    return torch.ldexp(torch.ones_like(bound), (HALF_TOP - top).clamp(-100, 100))


def _restore(own: _Operand, other: _Operand, amplifier: Tensor | None) -> Tensor | None:
    if own.power is None or other.shift is None or amplifier is None:
        return None
    return own.power / (other.shift * amplifier)


def _strip_shape(n: int, m: int, element_size: int) -> tuple[int, int]:
    """Rows and columns of a strip: all keys beside as many rows as fit, in strips of equal size."""
    elements = STRIP_BYTES // element_size
    tall, wide = elements // (m + 15), m
    if tall < min(STRIP_ROWS, n):
        tall = min(STRIP_ROWS, n)
        wide = max(128, elements // tall // 128 * 128)
    strips = triton.cdiv(n, tall)
    return min(n, triton.cdiv(triton.cdiv(n, strips), 128) * 128), wide


def weight_products(
    pairs: Pairs,
    weights: Weights,
    *,
    want_query: bool = False,
    want_key: bool = False,
    row_moment: bool = False,
    column_moment: bool = False,
) -> Products:
    """Writes W strip by strip in the features' dtype, and multiplies it by K and by Q.

    Both sides' scales are multiplied into the weights in fp32, before their one rounding, so no
    scaled copy of the features is made (but see _Operand for fp16).
    """
    n, m, depth = len(pairs.query), len(pairs.key), pairs.query.shape[1]
    zeros, empty = pairs.query_scale.new_zeros, pairs.query_scale.new_empty
    sums = empty if n and m else zeros
    left = _operand(pairs.query, pairs.query_scale)
    right = _operand(pairs.key, pairs.key_scale)
    amplifier = None if left.power is None else _amplifier(weights)
    products = Products(
        sums(n, depth) if want_query else None,
        sums(m, depth) if want_key else None,
        _restore(left, right, amplifier),
        _restore(right, left, amplifier),
        zeros(n if row_moment else 0),
        zeros(m if column_moment else 0),
    )
    if n == 0 or m == 0:
        return products
    op = "weights_moments" if row_moment or column_moment else "weights"
    if weights.sides == MIRROR:
        op = "weights_mirror"
    config = config_for(op, pairs.query, pairs.key)
    arguments = {
        "query": pairs.query,
        "key": pairs.key,
        "query_scale": pairs.query_scale,
        "key_scale": pairs.key_scale,
        "scale": pairs.scale,
        "row_lse": weights.row_lse,
        "row_weight": weights.row,
        # the kernel reads neither without its term; a launch wants some tensor
        "column_lse": weights.row_lse if weights.column_lse is None else weights.column_lse,
        "column_weight": weights.row if weights.column is None else weights.column,
        "row_factor": left.mantissa if amplifier is None else left.mantissa * amplifier,
        "column_factor": right.mantissa,
        "depth": depth,
        "query_stride": pairs.query.stride(0),
        "key_stride": pairs.key.stride(0),
        "HAS_FACTORS": amplifier is not None,
        "SIDES": weights.sides,
        "ROW_MOMENT": row_moment,
        "COLUMN_MOMENT": column_moment,
        **pairs.rules(),
        **tile_arguments(config, pairs.query),
    }
    tall, wide = _strip_shape(n, m, pairs.query.element_size())
    for top in range(0, n, tall):
        bottom = min(top + tall, n)
        for begin in range(0, m, wide):
            end = min(begin + wide, m)
            row_tiles = triton.cdiv(bottom - top, config.block_rows)
            column_tiles = triton.cdiv(end - begin, config.block_columns)
            height, width = row_tiles * config.block_rows, column_tiles * config.block_columns
            row_parts = empty(column_tiles, height if row_moment else 0)
            column_parts = empty(row_tiles, width if column_moment else 0)
            tiles = pairs.query.new_empty(height, width, dtype=written_dtype(pairs.query))
            kernels.weights_kernel[(row_tiles * column_tiles,)](
                strip=tiles,
                row_moment=row_parts,
                column_moment=column_parts,
                row_begin=top,
                row_end=bottom,
                column_begin=begin,
                column_end=end,
                strip_width=width,
                **arguments,
            )
            # the rest of the last tiles is not zero where a column has its own term
            strip = tiles[: bottom - top, : end - begin].to(pairs.query.dtype)
            if products.query is not None:
                own, keys = products.query[top:bottom], right.rows[begin:end]
                accumulate_product(own, strip, keys, first=begin == 0)
            if products.key is not None:
                own, queries = products.key[begin:end], left.rows[top:bottom]
                accumulate_product(own, strip.t(), queries, first=top == 0)
            if row_moment:
                products.row_moment[top:bottom] += row_parts.sum(0)[: bottom - top]
            if column_moment:
                products.column_moment[begin:end] += column_parts.sum(0)[: end - begin]
    return products
