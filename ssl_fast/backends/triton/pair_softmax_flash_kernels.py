# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernel of pair_softmax that gives the rows' statistics and expected keys in one sweep.

As attention does: the weights of a tile refer to the maximum so far, and are multiplied by the
tile's keys where they are made.
"""

import triton
import triton.language as tl

from ssl_fast.backends.triton.pair_softmax_fused_kernels import LIFT, LOWER, without_excluded
from ssl_fast.backends.triton.pair_softmax_kernels import finite_or_zero, log_sum_exp
from ssl_fast.backends.triton.tiles import LOG2_E, key_tiles, load_chunk, multiply


@triton.jit(do_not_specialize=["diagonal_0", "diagonal_1", "diagonal_2"])
def expectation_kernel(
    query,  # [N, D]
    key,  # [M, D]
    query_scale,  # [N] fp32
    key_scale,  # [M] fp32
    scale,  # [] fp32: s_ij = scale query_scale_i key_scale_j <query_i, key_j>
    query_ids,  # [N, IDS] int64
    key_ids,  # [M, IDS] int64
    lse_parts,  # [splits, N] fp32
    max_parts,  # [splits, N] fp32
    sum_parts,  # [splits, N, D] fp32
    n_queries,
    n_keys,
    depth,
    query_stride,
    key_stride,
    diagonal_0,
    diagonal_1,
    diagonal_2,
    DIAGONALS: tl.constexpr,
    IDS: tl.constexpr,
    MATCHING: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """A split's statistics of the rows, and sum_j p_ij key_scale_j key_j of its softmax.

    The logits are made once: each tile's weights refer to the maximum so far, and what was summed
    before is scaled down when that grows. Programs and tiles as in products_kernel.
    """
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS
    rows = row + tl.arange(0, BLOCK_ROWS)
    inside = rows < n_queries
    safe_rows = tl.minimum(rows, n_queries - 1)
    steps = tl.arange(0, BLOCK_DEPTH)
    left = load_chunk(
        query + safe_rows.to(tl.int64)[:, None] * query_stride + steps[None, :],
        (steps < depth)[None, :], EVEN_DEPTH,
    )  # fmt: skip
    row_factor = tl.load(query_scale + safe_rows) * tl.load(scale)

    maximum = tl.full([BLOCK_ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    product = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], dtype=tl.float32)
    begin, end = key_tiles(row, split, n_keys, False, BLOCK_COLUMNS)
    for tile in range(begin, end):
        column = tile * BLOCK_COLUMNS
        safe_columns = tl.minimum(column + tl.arange(0, BLOCK_COLUMNS), n_keys - 1)
        right = load_chunk(
            key + safe_columns.to(tl.int64)[:, None] * key_stride + steps[None, :],
            (steps < depth)[None, :], EVEN_DEPTH,
        )  # fmt: skip
        logits = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        logits = multiply(left, tl.trans(right), logits, PRECISION)
        column_factor = tl.load(key_scale + safe_columns)
        logits = logits * row_factor[:, None] * column_factor[None, :]
        logits = without_excluded(
            logits, row, column, query_ids, key_ids, n_queries, n_keys,
            diagonal_0, diagonal_1, diagonal_2,
            DIAGONALS, IDS, MATCHING, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip

        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        shift = finite_or_zero(new_maximum)
        carried = tl.exp2((maximum - shift) * LOG2_E)
        maximum = new_maximum
        shift *= LOG2_E
        if key.dtype.element_ty == tl.float16:
            shift -= LIFT
        weights = tl.exp2(logits * LOG2_E - shift[:, None])
        total = total * carried + tl.sum(weights, 1)
        weights *= column_factor[None, :]
        product = product * carried[:, None]
        product = multiply(weights.to(key.dtype.element_ty), right, product, PRECISION)

    place = split.to(tl.int64) * n_queries + rows
    # where nothing is kept the product is 0
    product = product / tl.where(total == 0.0, 1.0, total)[:, None]
    if key.dtype.element_ty == tl.float16:
        total *= LOWER
    # a NaN logit reaches the total but not the maximum, whose comparison drops it
    maximum = tl.where(total >= 0.0, maximum, total)
    tl.store(lse_parts + place, log_sum_exp(maximum, total), mask=inside)
    tl.store(max_parts + place, maximum, mask=inside)
    tl.store(
        sum_parts + place[:, None] * depth + steps[None, :],
        product,
        mask=inside[:, None] & (steps < depth)[None, :],
    )
