# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The two Triton kernels of pair_sigmoid that walk over tiles of Q Kᵀ.

`sweep_kernel` sums the loss of each row, `weights_kernel` turns the tiles of a strip into the
loss's derivatives by the logits for the library's products, and sums the loss on the way; neither
stores a logit. Sizes, offsets and tails are treated as in pair_softmax_kernels.
"""

import triton
import triton.language as tl

from ssl_fast.backends.triton.pointwise_kernels import log1p
from ssl_fast.backends.triton.tiles import (
    LOG2_E,
    kept_pairs,
    key_tiles,
    load_chunk,
    multiply,
    needs_rules,
    tile_products,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(exponents, powers):
    """log(1 + 2^x) from x and 2^-|x|, exact in relative terms near zero."""
    return tl.maximum(exponents, 0.0) * LN_2 + log1p(powers)


@triton.jit
def _signed(
    exponents,
    rows,
    columns,
    row_end,
    n_keys,
    positive,
    DIAGONALS: tl.constexpr,
):
    """The logits as the loss takes them: the positives' negated, -inf beyond the tails."""
    if DIAGONALS > 0:
        exponents = tl.where(columns[None, :] - rows[:, None] == positive, -exponents, exponents)
    kept = kept_pairs(rows, columns, row_end, n_keys, 0, 0, 0, 0, False)
    return tl.where(kept, exponents, -float("inf"))


@triton.jit(do_not_specialize=["positive"])
def sweep_kernel(
    query,  # [N, D]
    key,  # [M, D]
    query_scale,  # [N] fp32
    key_scale,  # [M] fp32
    bias,  # [] fp32
    row_loss,  # [splits, N] fp32
    n_queries,
    n_keys,
    depth,
    query_stride,
    key_stride,
    positive,
    DIAGONALS: tl.constexpr,
    RESIDENT: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """The loss of a block of rows over one split of the keys.

    DIAGONALS is 1 where the pairs j - i == positive count as positives, 0 where there are none.
    RESIDENT: the depth fits one chunk, and the query tile is loaded once for the whole sweep.
    """
    row = tl.program_id(0) * BLOCK_ROWS
    split = tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_ROWS)
    safe_rows = tl.minimum(rows, n_queries - 1)
    query_rows = query + safe_rows.to(tl.int64) * query_stride
    row_exponent = tl.load(query_scale + safe_rows) * LOG2_E
    offset = tl.load(bias) * LOG2_E
    steps = tl.arange(0, BLOCK_DEPTH)
    if RESIDENT:
        left = load_chunk(
            query_rows[:, None] + steps[None, :], (steps < depth)[None, :], EVEN_DEPTH
        )

    begin, end = key_tiles(row, split, n_keys, False, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for tile in range(begin, end):
        column = tile * BLOCK_COLUMNS
        columns = column + tl.arange(0, BLOCK_COLUMNS)
        safe_columns = tl.minimum(columns, n_keys - 1)
        key_rows = key + safe_columns.to(tl.int64) * key_stride
        if RESIDENT:
            right = load_chunk(
                key_rows[None, :] + steps[:, None], (steps < depth)[:, None], EVEN_DEPTH
            )
            products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
            products = multiply(left, right, products, PRECISION)
        else:
            products = tile_products(
                query_rows, key_rows, depth, EVEN_DEPTH, PRECISION,
                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
            )  # fmt: skip
        column_factor = tl.load(key_scale + columns, mask=columns < n_keys, other=0.0)
        exponents = products * row_exponent[:, None] * column_factor[None, :] + offset
        if needs_rules(
            row, column, n_queries, n_keys, positive, 0, 0,
            DIAGONALS, False, BLOCK_ROWS, BLOCK_COLUMNS,
        ):  # fmt: skip
            exponents = _signed(exponents, rows, columns, n_queries, n_keys, positive, DIAGONALS)
        powers = tl.exp2(-tl.abs(exponents))
        total += tl.sum(_softplus(exponents, powers), 1)

    place = split.to(tl.int64) * n_queries + rows
    tl.store(row_loss + place, total, mask=rows < n_queries)


@triton.jit
def _store_weights(
    products,
    rows,
    columns,
    row_tile,
    column_tile,
    column_tiles,
    query_scale,
    key_scale,
    bias,
    row_weight,
    row_factor,
    column_factor,
    strip,
    row_parts,
    column_parts,
    row_end,
    column_end,
    strip_height,
    strip_width,
    positive,
    DIAGONALS: tl.constexpr,
    RULES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """From a tile of products to its weights in the strip; RULES: with tails and positives."""
    inside_rows = rows < row_end
    inside_columns = columns < column_end
    row_scale = tl.load(query_scale + rows, mask=inside_rows, other=0.0)
    column_scale = tl.load(key_scale + columns, mask=inside_columns, other=0.0)
    row_exponent = row_scale * LOG2_E
    offset = tl.load(bias) * LOG2_E
    exponents = products * row_exponent[:, None] * column_scale[None, :] + offset
    if RULES:
        exponents = _signed(exponents, rows, columns, row_end, column_end, positive, DIAGONALS)

    # places are counted from the strip's corner, or the compiler would not see them aligned
    strip_rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    strip_columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_places = row_parts + column_tile.to(tl.int64) * strip_height + strip_rows
    field = column_tiles.to(tl.int64) * strip_height
    powers = tl.exp2(-tl.abs(exponents))
    tl.store(row_places, tl.sum(_softplus(exponents, powers), 1))
    weights = tl.where(exponents >= 0.0, 1.0, powers) / (1.0 + powers)
    if RULES and DIAGONALS > 0:
        weights = tl.where(columns[None, :] - rows[:, None] == positive, -weights, weights)
    if HAS_WEIGHT:
        weights *= tl.load(row_weight + rows, mask=inside_rows, other=0.0)[:, None]
    tl.store(row_places + field, tl.sum(weights, 1))
    tl.store(row_places + 2 * field, tl.sum(weights * (products * column_scale[None, :]), 1))
    column_places = column_parts + row_tile.to(tl.int64) * strip_width + strip_columns
    tl.store(column_places, tl.sum(weights * (products * row_scale[:, None]), 0))

    if HAS_FACTORS:
        row_scale = tl.load(row_factor + rows, mask=inside_rows, other=0.0)
        column_scale = tl.load(column_factor + columns, mask=inside_columns, other=0.0)
    weights = weights * row_scale[:, None] * column_scale[None, :]
    places = strip + strip_rows.to(tl.int64)[:, None] * strip_width + strip_columns[None, :]
    tl.store(places, weights.to(strip.dtype.element_ty))


@triton.jit(do_not_specialize=["positive", "row_begin", "row_end", "column_begin"])
def weights_kernel(
    query,  # [N, D]
    key,  # [M, D]
    query_scale,  # [N] fp32
    key_scale,  # [M] fp32
    bias,  # [] fp32: s_ij = query_scale_i key_scale_j <q_i, k_j> + bias
    row_weight,  # [N] fp32, read with HAS_WEIGHT
    row_factor,  # [N] fp32, read with HAS_FACTORS, query_scale without
    column_factor,  # [M] fp32, read with HAS_FACTORS, key_scale without
    strip,  # [height, width], both whole tiles
    row_parts,  # [3, column tiles, height] fp32
    column_parts,  # [1, row tiles, width] fp32
    row_begin,
    row_end,
    column_begin,
    column_end,
    depth,
    query_stride,
    key_stride,
    strip_width,
    positive,
    DIAGONALS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile of W_ij * row_factor_i * column_factor_j, W_ij = row_weight_i d loss_i / d s_ij.

    That is sigmoid(s_ij), and -sigmoid(-s_ij) for a positive, never sigmoid(s_ij) - 1. row_parts
    gets the tile's sums over j of the loss, of W_ij and of W_ij key_scale_j <q_i, k_j>,
    column_parts those over i of W_ij query_scale_i <q_i, k_j>.
    """
    row_tiles = tl.cdiv(row_end - row_begin, BLOCK_ROWS)
    column_tiles = tl.cdiv(column_end - column_begin, BLOCK_COLUMNS)
    program = tl.program_id(0)
    row_tile = program % row_tiles
    column_tile = program // row_tiles
    row = row_begin + row_tile * BLOCK_ROWS
    column = column_begin + column_tile * BLOCK_COLUMNS
    rows = row + tl.arange(0, BLOCK_ROWS)
    columns = column + tl.arange(0, BLOCK_COLUMNS)
    safe_rows = tl.minimum(rows, row_end - 1)
    safe_columns = tl.minimum(columns, column_end - 1)
    products = tile_products(
        query + safe_rows.to(tl.int64) * query_stride,
        key + safe_columns.to(tl.int64) * key_stride,
        depth, EVEN_DEPTH, PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
    )  # fmt: skip
    # two copies of the epilogue: a masked tile that leaves a branch would be a second tile in
    # registers
    if needs_rules(
        row, column, row_end, column_end, positive, 0, 0,
        DIAGONALS, False, BLOCK_ROWS, BLOCK_COLUMNS,
    ):  # fmt: skip
        _store_weights(
            products, rows, columns, row_tile, column_tile, column_tiles, query_scale, key_scale,
            bias, row_weight, row_factor, column_factor, strip, row_parts, column_parts,
            row_end, column_end, row_tiles * BLOCK_ROWS, strip_width, positive,
            DIAGONALS, True, HAS_WEIGHT, HAS_FACTORS, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        _store_weights(
            products, rows, columns, row_tile, column_tile, column_tiles, query_scale, key_scale,
            bias, row_weight, row_factor, column_factor, strip, row_parts, column_parts,
            row_end, column_end, row_tiles * BLOCK_ROWS, strip_width, positive,
            DIAGONALS, False, HAS_WEIGHT, HAS_FACTORS, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
