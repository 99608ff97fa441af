# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The two Triton kernels of pair_softmax that walk over tiles of Q Kᵀ.

`sweep_kernel` reduces every tile to row and column statistics at once, `weights_kernel` turns the
tiles of a strip into softmax weights for the library's products; neither stores a logit.
Sizes and indices of rows are int32, offsets into memory int64. Tails are clamped where they are
read and masked where they would count, so that no address outside a tensor is ever formed.
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
    tile_products,
)

ROWS = tl.constexpr(1)
BOTH = tl.constexpr(2)
MIRROR = tl.constexpr(3)


@triton.jit
def finite_or_zero(maximum):
    """A maximum that can be subtracted: inf - inf would turn an infinite sum into NaN."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def log_sum_exp(maximum, total):
    """From a maximum and the sum of exponentials beside it; -inf of no terms."""
    return tl.where(total == 0.0, -float("inf"), finite_or_zero(maximum) + tl.log(total))


@triton.jit
def _store_columns(logits, lse_places, max_places, inside):
    maximum = tl.max(logits, 0)
    shift = finite_or_zero(maximum) * LOG2_E
    total = tl.sum(tl.exp2(logits * LOG2_E - shift[None, :]), 0)
    tl.store(lse_places, log_sum_exp(maximum, total), mask=inside)
    tl.store(max_places, maximum, mask=inside)


@triton.jit(do_not_specialize=["diagonal_0", "diagonal_1", "diagonal_2", "row_begin", "row_end"])
def sweep_kernel(
    query,  # [N, D]
    key,  # [M, D]
    query_scale,  # [N] fp32
    key_scale,  # [M] fp32
    query_ids,  # [N, IDS] int64
    key_ids,  # [M, IDS] int64
    row_lse,  # [splits, N] fp32
    row_max,  # [splits, N] fp32
    column_lse,  # [row blocks, M] fp32, written with COLUMNS
    column_max,  # [row blocks, M] fp32, written with COLUMNS
    row_begin,
    row_end,
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
    COLUMNS: tl.constexpr,
    TRIANGLE: tl.constexpr,
    RESIDENT: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Log-sum-exp and maximum of a block of rows over one split of the keys.

    Program (b, s) owns rows row_begin + b * BLOCK_ROWS and on, and every so-many tiles of keys.
    With COLUMNS it also leaves each tile's column statistics in row b of a table: each entry has
    one writer, so the merge that follows has a fixed order. TRIANGLE visits only pairs with
    j > i (a symmetric matrix: columns stand for the other half). RESIDENT: the depth fits one
    chunk, and the query tile is loaded once for the whole sweep.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    row = row_begin + block * BLOCK_ROWS
    rows = row + tl.arange(0, BLOCK_ROWS)
    safe_rows = tl.minimum(rows, row_end - 1)
    query_rows = query + safe_rows.to(tl.int64) * query_stride
    row_factor = tl.load(query_scale + safe_rows)
    steps = tl.arange(0, BLOCK_DEPTH)
    if RESIDENT:
        left = load_chunk(
            query_rows[:, None] + steps[None, :], (steps < depth)[None, :], EVEN_DEPTH
        )

    begin, end = key_tiles(row, split, n_keys, TRIANGLE, BLOCK_COLUMNS)
    maximum = tl.full([BLOCK_ROWS], -float("inf"), dtype=tl.float32)
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
            logits = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
            logits = multiply(left, right, logits, PRECISION)
        else:
            logits = tile_products(
                query_rows, key_rows, depth, EVEN_DEPTH, PRECISION,
                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
            )  # fmt: skip
        column_factor = tl.load(key_scale + columns, mask=columns < n_keys, other=0.0)
        logits = logits * row_factor[:, None] * column_factor[None, :]
        if IDS > 0:
            excluded = ids_exclude(query_ids, key_ids, safe_rows, safe_columns, IDS, MATCHING)
            logits = tl.where(excluded, -float("inf"), logits)
        if needs_rules(
            row, column, row_end, n_keys, diagonal_0, diagonal_1, diagonal_2,
            DIAGONALS, TRIANGLE, BLOCK_ROWS, BLOCK_COLUMNS,
        ):  # fmt: skip
            kept = kept_pairs(
                rows, columns, row_end, n_keys, diagonal_0, diagonal_1, diagonal_2,
                DIAGONALS, TRIANGLE,
            )  # fmt: skip
            logits = tl.where(kept, logits, -float("inf"))

        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        shift = finite_or_zero(new_maximum)
        carried = tl.exp2((maximum - shift) * LOG2_E)
        terms = tl.exp2(logits * LOG2_E - (shift * LOG2_E)[:, None])
        total = total * carried + tl.sum(terms, 1)
        maximum = new_maximum

        if COLUMNS:
            place = block.to(tl.int64) * n_keys + columns
            _store_columns(logits, column_lse + place, column_max + place, columns < n_keys)

    place = split.to(tl.int64) * n_queries + rows
    # a NaN logit reaches the total but not the maximum, whose comparison drops it
    maximum = tl.where(total >= 0.0, maximum, total)
    tl.store(row_lse + place, log_sum_exp(maximum, total), mask=rows < row_end)
    tl.store(row_max + place, maximum, mask=rows < row_end)


@triton.jit
def _store_weights(
    products,
    rows,
    columns,
    row_tile,
    column_tile,
    query_scale,
    key_scale,
    scale,
    query_ids,
    key_ids,
    row_lse,
    row_weight,
    column_lse,
    column_weight,
    row_factor,
    column_factor,
    strip,
    row_parts,
    column_parts,
    row_end,
    column_end,
    strip_height,
    strip_width,
    diagonal_0,
    diagonal_1,
    diagonal_2,
    DIAGONALS: tl.constexpr,
    RULES: tl.constexpr,
    IDS: tl.constexpr,
    MATCHING: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    SIDES: tl.constexpr,
    ROW_MOMENT: tl.constexpr,
    COLUMN_MOMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """From a tile of products to its weights in the strip; RULES: with tails and exclusions."""
    inside_rows = rows < row_end
    inside_columns = columns < column_end
    row_scale = tl.load(query_scale + rows, mask=inside_rows, other=0.0)
    column_scale = tl.load(key_scale + columns, mask=inside_columns, other=0.0)
    row_exponent = row_scale * (tl.load(scale) * LOG2_E)
    exponents = products * row_exponent[:, None] * column_scale[None, :]
    if IDS > 0:
        safe_rows = tl.minimum(rows, row_end - 1)
        safe_columns = tl.minimum(columns, column_end - 1)
        excluded = ids_exclude(query_ids, key_ids, safe_rows, safe_columns, IDS, MATCHING)
        exponents = tl.where(excluded, -float("inf"), exponents)
    if RULES:
        kept = kept_pairs(
            rows, columns, row_end, column_end, diagonal_0, diagonal_1, diagonal_2,
            DIAGONALS, False,
        )  # fmt: skip
        exponents = tl.where(kept, exponents, -float("inf"))

    # places are counted from the strip's corner, or the compiler would not see them aligned
    strip_rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    strip_columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_moments = row_parts + column_tile.to(tl.int64) * strip_height + strip_rows
    shift = tl.load(row_lse + rows, mask=inside_rows, other=0.0) * LOG2_E
    factor = tl.load(row_weight + rows, mask=inside_rows, other=0.0)
    weights = tl.exp2(exponents - shift[:, None]) * factor[:, None]
    if SIDES == MIRROR:
        tl.store(row_moments, tl.sum(weights * (products * column_scale[None, :]), 1))
    if SIDES != ROWS:
        shift = tl.load(column_lse + columns, mask=inside_columns, other=0.0) * LOG2_E
        column_term = tl.exp2(exponents - shift[None, :])
        if SIDES == BOTH:
            factor = tl.load(column_weight + columns, mask=inside_columns, other=0.0)
            column_term *= factor[None, :]
        weights += column_term
    if ROW_MOMENT and SIDES != MIRROR:
        tl.store(row_moments, tl.sum(weights * (products * column_scale[None, :]), 1))
    if COLUMN_MOMENT:
        column_moments = column_parts + row_tile.to(tl.int64) * strip_width + strip_columns
        tl.store(column_moments, tl.sum(weights * (products * row_scale[:, None]), 0))

    if HAS_FACTORS:
        row_scale = tl.load(row_factor + rows, mask=inside_rows, other=0.0)
        column_scale = tl.load(column_factor + columns, mask=inside_columns, other=0.0)
    weights = weights * row_scale[:, None] * column_scale[None, :]
    places = strip + strip_rows.to(tl.int64)[:, None] * strip_width + strip_columns[None, :]
    tl.store(places, weights.to(strip.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "diagonal_0", "diagonal_1", "diagonal_2", "row_begin", "row_end", "column_begin",
    ]
)  # fmt: skip
def weights_kernel(
    query,  # [N, D]
    key,  # [M, D]
    query_scale,  # [N] fp32
    key_scale,  # [M] fp32
    scale,  # [] fp32: s_ij = scale query_scale_i key_scale_j <q_i, k_j>
    query_ids,  # [N, IDS] int64
    key_ids,  # [M, IDS] int64
    row_lse,  # [N] fp32, never -inf
    row_weight,  # [N] fp32
    column_lse,  # [M] fp32, never -inf, read with BOTH
    column_weight,  # [M] fp32, read with BOTH
    row_factor,  # [N] fp32, read with HAS_FACTORS, query_scale without
    column_factor,  # [M] fp32, read with HAS_FACTORS, key_scale without
    strip,  # [height, width], both whole tiles
    row_parts,  # [1, column tiles, height] fp32, written with ROW_MOMENT
    column_parts,  # [1, row tiles, width] fp32, written with COLUMN_MOMENT
    row_begin,
    row_end,
    column_begin,
    column_end,
    depth,
    query_stride,
    key_stride,
    strip_width,
    diagonal_0,
    diagonal_1,
    diagonal_2,
    DIAGONALS: tl.constexpr,
    IDS: tl.constexpr,
    MATCHING: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    SIDES: tl.constexpr,
    ROW_MOMENT: tl.constexpr,
    COLUMN_MOMENT: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile of W_ij * row_factor_i * column_factor_j, 0 where a pair is excluded.

    SIDES == ROWS: W_ij = row_weight_i exp(s_ij - row_lse_i). BOTH: + column_weight_j
    exp(s_ij - column_lse_j). MIRROR (S symmetric): + exp(s_ij - column_lse_j), the weight being
    folded into column_lse. ROW_MOMENT leaves sum_j W_ij key_scale_j <q_i, k_j> of the tile (MIRROR
    does, of the row term alone), COLUMN_MOMENT sum_i W_ij query_scale_i <q_i, k_j>.
    """
    row_tiles = tl.cdiv(row_end - row_begin, BLOCK_ROWS)
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
        row, column, row_end, column_end, diagonal_0, diagonal_1, diagonal_2,
        DIAGONALS, False, BLOCK_ROWS, BLOCK_COLUMNS,
    ):  # fmt: skip
        _store_weights(
            products, rows, columns, row_tile, column_tile, query_scale, key_scale, scale,
            query_ids, key_ids, row_lse, row_weight, column_lse, column_weight,
            row_factor, column_factor, strip, row_parts, column_parts, row_end, column_end,
            row_tiles * BLOCK_ROWS, strip_width, diagonal_0, diagonal_1, diagonal_2,
            DIAGONALS, True, IDS, MATCHING, HAS_FACTORS, SIDES, ROW_MOMENT, COLUMN_MOMENT,
            BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        _store_weights(
            products, rows, columns, row_tile, column_tile, query_scale, key_scale, scale,
            query_ids, key_ids, row_lse, row_weight, column_lse, column_weight,
            row_factor, column_factor, strip, row_parts, column_parts, row_end, column_end,
            row_tiles * BLOCK_ROWS, strip_width, diagonal_0, diagonal_1, diagonal_2,
            DIAGONALS, False, IDS, MATCHING, HAS_FACTORS, SIDES, ROW_MOMENT, COLUMN_MOMENT,
            BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
