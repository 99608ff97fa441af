"""Sums over weights W [N, M]: strips of W, written by an op's kernel, times K and Q.

W_ij are the derivatives of a loss by the logits. A strip of them is bounded in memory; the products
are the library's, and their sums over strips are kept in fp32. Nothing here reads a value on the
host.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton.device import accumulate_product, written_dtype
from ssl_fast.backends.triton.launch import Sides, tile_arguments
from ssl_fast.backends.triton.tuning import Config

STRIP_BYTES = 256 * 2**20
# A strip this tall still fills a card; where not all keys fit beside it, it is cut in columns too.
STRIP_ROWS = 1024
# fp16 operands are scaled to 2^14 at most: 2^-24 is their smallest step, 65504 their largest value.
HALF_TOP = 14


@dataclass(frozen=True)
class Products:
    """The sums over the weights, None or empty where not asked for."""

    query: Tensor | None  # [N, D] fp32: restore_query_i query_i = sum_j W_ij f_i ks_j k_j
    key: Tensor | None  # [M, D] fp32: restore_key_j key_j = sum_i W_ij f_i ks_j q_i
    restore_query: Tensor | None  # [N]; None is 1
    restore_key: Tensor | None  # [M]; None is 1
    row_sums: Tensor  # [as many as the kernel leaves, N]
    column_sums: Tensor  # [as many as the kernel leaves, M]


@dataclass(frozen=True)
class Operand:
    """One side's features as a product takes them: factor_i x_i = mantissa_i rows_i / shift.

    bf16 and fp32 weights have the range to carry factor_i, and the features go in as they are.
    fp16 has not: the factor's power of two goes into a copy of the features, scaled as a whole to
    fp16's upper range, and only the mantissa, in [0.5, 1), into the weights.
    """

    rows: Tensor  # [N, D], power_i shift x_i
    mantissa: Tensor  # [N]
    power: Tensor | None  # [N]; None is 1
    shift: Tensor | None  # []; None is 1


def operand(features: Tensor, factor: Tensor, *, multiplied: bool) -> Operand:
    """The operand; the copy of fp16 features is made where they are multiplied by weights."""
    if features.dtype != torch.float16:
        return Operand(features, factor, None, None)
    mantissa, exponent = torch.frexp(factor)
    power = torch.ldexp(torch.ones_like(factor), exponent)
    if not multiplied:
        return Operand(features, mantissa, power, None)
    sizes = torch.linalg.vector_norm(features, torch.inf, dim=1, dtype=torch.float32)
    _, top = torch.frexp((sizes * power).amax())
    shift = torch.ldexp(power.new_ones(()), (HALF_TOP - top).clamp(-100, 100))
    scaled = torch.empty_like(features, memory_format=torch.contiguous_format)
    torch.mul(features, (power * shift)[:, None], out=scaled)
    return Operand(scaled, mantissa, power, shift)


def amplifier_of(bound: Tensor) -> Tensor:
    """The power of two that brings fp16 weights to the upper end of their range."""
    _, top = torch.frexp(bound)
    return torch.ldexp(torch.ones_like(bound), (HALF_TOP - top).clamp(-100, 100))


def _restore(own: Operand, other: Operand, amplifier: Tensor | None) -> Tensor | None:
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


def largest(weight: Tensor) -> Tensor:
    """The largest magnitude, [], 0 of nothing."""
    return weight.abs().amax() if weight.numel() else weight.new_zeros(())


def as_gradient(sums: Tensor | None, restore: Tensor | None, features: Tensor) -> Tensor:
    """The features' gradient from its sums; empty without."""
    if sums is None:
        return features.new_empty(0)
    if restore is not None:
        sums = sums * restore[:, None]
    return sums.to(features.dtype)


def strip_products(
    kernel: Any,
    config: Config,
    sides: Sides,
    arguments: dict[str, Any],
    *,
    bound: Tensor,  # [], what no W_ij exceeds
    query_factor: Tensor | None = None,  # [N]: f; None is query_scale
    want_query: bool,
    want_key: bool,
    row_sums: int,
    column_sums: int,
) -> Products:
    """Writes W strip by strip in the features' dtype, and multiplies it by K and by Q.

    The kernel takes its own arguments and a strip's, and leaves each tile's row_sums sums over
    columns in row_parts [row_sums, column tiles, height] and column_sums over rows in column_parts.
    Both sides' factors are multiplied into the weights in fp32, before their one rounding, so no
    scaled copy of the features is made (but see Operand for fp16).
    """
    n, m, depth = len(sides.query), len(sides.key), sides.query.shape[1]
    zeros, empty = sides.query_scale.new_zeros, sides.query_scale.new_empty
    sums = empty if n and m else zeros
    factor = sides.query_scale if query_factor is None else query_factor
    left = right = Operand(sides.query, factor, None, None)
    amplifier = None
    if n and m:
        left = operand(sides.query, factor, multiplied=want_key)
        right = operand(sides.key, sides.key_scale, multiplied=want_query)
        amplifier = None if left.power is None else amplifier_of(bound)
    products = Products(
        sums(n, depth) if want_query else None,
        sums(m, depth) if want_key else None,
        _restore(left, right, amplifier),
        _restore(right, left, amplifier),
        zeros(row_sums, n),
        zeros(column_sums, m),
    )
    if n == 0 or m == 0:
        return products
    arguments = {
        **sides.features(),
        **tile_arguments(config, sides.query),
        "query_scale": sides.query_scale,
        "key_scale": sides.key_scale,
        "row_factor": left.mantissa if amplifier is None else left.mantissa * amplifier,
        "column_factor": right.mantissa,
        "HAS_FACTORS": amplifier is not None or query_factor is not None,
        **arguments,
    }
    tall, wide = _strip_shape(n, m, sides.query.element_size())
    for top in range(0, n, tall):
        bottom = min(top + tall, n)
        for begin in range(0, m, wide):
            end = min(begin + wide, m)
            row_tiles = triton.cdiv(bottom - top, config.block_rows)
            column_tiles = triton.cdiv(end - begin, config.block_columns)
            height, width = row_tiles * config.block_rows, column_tiles * config.block_columns
            row_parts = empty(row_sums, column_tiles, height)
            column_parts = empty(column_sums, row_tiles, width)
            tiles = sides.query.new_empty(height, width, dtype=written_dtype(sides.query))
            kernel[(row_tiles * column_tiles,)](
                strip=tiles,
                row_parts=row_parts,
                column_parts=column_parts,
                row_begin=top,
                row_end=bottom,
                column_begin=begin,
                column_end=end,
                strip_width=width,
                **arguments,
            )
            # the rest of the last tiles is not zero where a column has its own term
            strip = tiles[: bottom - top, : end - begin].to(sides.query.dtype)
            if products.query is not None:
                own, keys = products.query[top:bottom], right.rows[begin:end]
                accumulate_product(own, strip, keys, first=begin == 0)
            if products.key is not None:
                own, queries = products.key[begin:end], left.rows[top:bottom]
                accumulate_product(own, strip.t(), queries, first=top == 0)
            if row_sums:
                products.row_sums[:, top:bottom] += row_parts.sum(1)[:, : bottom - top]
            if column_sums:
                products.column_sums[:, begin:end] += column_parts.sum(1)[:, : end - begin]
    return products
