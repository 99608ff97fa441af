# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernel of pair_softmax that multiplies the weights where they are made.

A program owns rows of one side and walks over the other side's tiles: logits, weights and their
product with the other side's features stay on chip. Queries and keys take turns as the own side,
each at the price of the logits again; what that saves is the strip's way through memory.
"""

import triton
import triton.language as tl

from ssl_fast.backends.triton.tiles import (
    LOG2_E,
    ids_exclude,
    kept_pairs,
    key_tiles,
    load_chunk,
    multiply,
    needs_rules,
)

OWN = tl.constexpr(1)
OTHER = tl.constexpr(2)
BOTH = tl.constexpr(3)
MIRROR = tl.constexpr(4)
# fp16 weights of at most 1 are rounded 2^14 times as large: 6e-5 is the smallest normal number.
LIFT = tl.constexpr(14)
LOWER = tl.constexpr(2.0**-14)


@triton.jit
def without_excluded(
    exponents,
    row,
    column,
    own_ids,
    other_ids,
    n_own,
    n_other,
    diagonal_0,
    diagonal_1,
    diagonal_2,
    DIAGONALS: tl.constexpr,
    IDS: tl.constexpr,
    MATCHING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The tile at (row, column) with -inf where a pair is a tail or leaves the softmax."""
    rows = row + tl.arange(0, BLOCK_ROWS)
    columns = column + tl.arange(0, BLOCK_COLUMNS)
    if IDS > 0:
        safe_rows = tl.minimum(rows, n_own - 1)
        safe_columns = tl.minimum(columns, n_other - 1)
        excluded = ids_exclude(own_ids, other_ids, safe_rows, safe_columns, IDS, MATCHING)
        exponents = tl.where(excluded, -float("inf"), exponents)
    if needs_rules(
        row, column, n_own, n_other, diagonal_0, diagonal_1, diagonal_2,
        DIAGONALS, False, BLOCK_ROWS, BLOCK_COLUMNS,
    ):  # fmt: skip
        kept = kept_pairs(
            rows, columns, n_own, n_other, diagonal_0, diagonal_1, diagonal_2, DIAGONALS, False
        )
        exponents = tl.where(kept, exponents, -float("inf"))
    return exponents


@triton.jit
def _weights(
    exponents,
    column_scale,
    row_shift,
    row_weight,
    other_lse,
    other_weight,
    columns,  # [BLOCK_COLUMNS], none beyond the last
    TERMS: tl.constexpr,
):
    """A tile of W_ij other_scale_j (OWN: but for own_weight_i), and what the moment takes of it."""
    if TERMS != OTHER:
        weights = tl.exp2(exponents - row_shift[:, None]) * column_scale[None, :]
        if TERMS != OWN:
            weights *= row_weight[:, None]
        weighed = weights
    if TERMS != OWN:
        column_shift = tl.load(other_lse + columns) * LOG2_E
        column_weight = tl.load(other_weight + columns) * column_scale
        term = tl.exp2(exponents - column_shift[None, :]) * column_weight[None, :]
        weights = term if TERMS == OTHER else weights + term
        if TERMS != MIRROR:
            weighed = weights
    return weights, weighed


@triton.jit(do_not_specialize=["diagonal_0", "diagonal_1", "diagonal_2"])
def products_kernel(
    own,  # [N, D]
    other,  # [M, D]
    own_scale,  # [N] fp32
    other_scale,  # [M] fp32
    scale,  # [] fp32: s_ij = scale own_scale_i other_scale_j <own_i, other_j>
    own_ids,  # [N, IDS] int64
    other_ids,  # [M, IDS] int64
    own_lse,  # [N] fp32, never -inf, not read with OTHER
    own_weight,  # [N] fp32, not read with OTHER
    other_lse,  # [M] fp32, never -inf, not read with OWN
    other_weight,  # [M] fp32, not read with OWN
    own_factor,  # [N] fp32
    sum_parts,  # [splits, N, D] fp32, written with PRODUCT
    moment_parts,  # [splits, N] fp32, written with MOMENT
    n_own,
    n_other,
    depth,
    own_stride,
    other_stride,
    diagonal_0,
    diagonal_1,
    diagonal_2,
    DIAGONALS: tl.constexpr,
    IDS: tl.constexpr,
    MATCHING: tl.constexpr,
    TERMS: tl.constexpr,
    PRODUCT: tl.constexpr,
    MOMENT: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """own_factor_i sum_j W_ij other_scale_j other_j, and sum_j W_ij other_scale_j <own_i, other_j>.

    TERMS == OWN: W_ij = own_weight_i exp(s_ij - own_lse_i). OTHER: other_weight_j
    exp(s_ij - other_lse_j). BOTH: their sum. MIRROR: that, and the own term's moment alone.
    Program (b, s) owns BLOCK_ROWS rows and every so-many tiles of the other side; BLOCK_DEPTH
    covers the depth. A factor of the row multiplies the fp32 sums, not the weights, where they are
    one term.
    """
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS
    rows = row + tl.arange(0, BLOCK_ROWS)
    inside = rows < n_own
    safe_rows = tl.minimum(rows, n_own - 1)
    steps = tl.arange(0, BLOCK_DEPTH)
    left = load_chunk(
        own + safe_rows.to(tl.int64)[:, None] * own_stride + steps[None, :],
        (steps < depth)[None, :], EVEN_DEPTH,
    )  # fmt: skip
    row_exponent = tl.load(own_scale + safe_rows) * (tl.load(scale) * LOG2_E)
    row_factor = tl.load(own_factor + safe_rows)
    row_weight = tl.full([BLOCK_ROWS], 1.0, dtype=tl.float32)
    row_shift = row_weight
    if TERMS != OTHER:
        row_weight = tl.load(own_weight + safe_rows)
        row_shift = tl.load(own_lse + safe_rows) * LOG2_E
        if TERMS == OWN and other.dtype.element_ty == tl.float16:
            row_shift -= LIFT
            row_weight *= LOWER

    product = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], dtype=tl.float32)
    moment = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    begin, end = key_tiles(row, split, n_other, False, BLOCK_COLUMNS)
    for tile in range(begin, end):
        column = tile * BLOCK_COLUMNS
        columns = column + tl.arange(0, BLOCK_COLUMNS)
        safe_columns = tl.minimum(columns, n_other - 1)
        right = load_chunk(
            other + safe_columns.to(tl.int64)[:, None] * other_stride + steps[None, :],
            (steps < depth)[None, :], EVEN_DEPTH,
        )  # fmt: skip
        logits = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        logits = multiply(left, tl.trans(right), logits, PRECISION)
        column_scale = tl.load(other_scale + safe_columns)
        exponents = logits * row_exponent[:, None] * column_scale[None, :]
        exponents = without_excluded(
            exponents, row, column, own_ids, other_ids, n_own, n_other,
            diagonal_0, diagonal_1, diagonal_2,
            DIAGONALS, IDS, MATCHING, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
        weights, weighed = _weights(
            exponents, column_scale, row_shift, row_weight, other_lse, other_weight, safe_columns,
            TERMS,
        )  # fmt: skip
        if MOMENT:
            moment += tl.sum(weighed * logits, 1)
        if PRODUCT:
            product = multiply(weights.to(other.dtype.element_ty), right, product, PRECISION)

    place = split.to(tl.int64) * n_own + rows
    if TERMS == OWN:
        row_factor *= row_weight
        moment *= row_weight
    if MOMENT:
        tl.store(moment_parts + place, moment, mask=inside)
    if PRODUCT:
        tl.store(
            sum_parts + place[:, None] * depth + steps[None, :],
            product * row_factor[:, None],
            mask=inside[:, None] & (steps < depth)[None, :],
        )
