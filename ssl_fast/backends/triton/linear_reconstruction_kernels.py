# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernel of linear_reconstruction: one tile of the layer's output becomes its losses.

Their sums over the tile's columns are kept, and either nothing else, or the losses themselves, or
the slopes in a strip for the library's products. Rows of the input are the rows of a tile, outputs
its columns; sizes, offsets and tails are treated as in pair_softmax_kernels.
"""

import triton
import triton.language as tl

from ssl_fast.backends.triton.pointwise_kernels import terms
from ssl_fast.backends.triton.tiles import tile_products

# What a tile leaves beside its sums.
NOTHING, LOSSES, SLOPES = (tl.constexpr(i) for i in range(3))
# How far a weight or a mask reaches.
ABSENT, ROWS, ELEMENTS = (tl.constexpr(i) for i in range(3))


@triton.jit(do_not_specialize=["row_begin", "row_end", "column_begin"])
def losses_kernel(  # noqa: PLR0915
    query,  # [N, H], the input
    key,  # [D, H], the layer's weight
    bias,  # [D] fp32, read with HAS_BIAS
    target,  # [N, D]
    weight,  # [N] or [N, D] fp32, read unless WEIGHT is ABSENT
    mask,  # [N] or [N, D] int8, read unless MASK is ABSENT
    pos_weight,  # [D] fp32, read with POSITIVE
    row_factor,  # [N] fp32, read with HAS_FACTORS
    column_factor,  # [D] fp32, read with HAS_FACTORS
    strip,  # the losses [N, D], or the slopes [height, width], both whole tiles
    row_parts,  # [1, column tiles, height] fp32
    column_parts,  # [1, row tiles, width] fp32
    row_begin,
    row_end,
    column_begin,
    column_end,
    depth,
    query_stride,
    key_stride,
    target_stride,
    weight_stride,
    mask_stride,
    strip_width,
    parameter,
    target_scale,
    target_shift,
    KIND: tl.constexpr,
    POSITIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
    MASK: tl.constexpr,
    LEAVES: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile: row_parts gets its losses summed over columns, column_parts its slopes over rows.

    The slopes are stored times both factors (fp16's range is too small without).
    """
    row_tiles = tl.cdiv(row_end - row_begin, BLOCK_ROWS)
    program = tl.program_id(0)
    row_tile = program % row_tiles
    column_tile = program // row_tiles
    rows = row_begin + row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_begin + column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    safe_rows = tl.minimum(rows, row_end - 1).to(tl.int64)
    safe_columns = tl.minimum(columns, column_end - 1)
    x = tile_products(
        query + safe_rows * query_stride,
        key + safe_columns.to(tl.int64) * key_stride,
        depth, EVEN_DEPTH, PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
    )  # fmt: skip
    if HAS_BIAS:
        x += tl.load(bias + safe_columns)[None, :]
    inside_rows = rows < row_end
    inside_columns = columns < column_end
    kept = inside_rows[:, None] & inside_columns[None, :]
    if MASK == ROWS:
        kept = kept & (tl.load(mask + safe_rows) != 0)[:, None]
    elif MASK == ELEMENTS:
        places = mask + safe_rows[:, None] * mask_stride + safe_columns[None, :]
        kept = kept & (tl.load(places) != 0)
    # what isn't kept isn't read either
    goal = tl.load(
        target + safe_rows[:, None] * target_stride + safe_columns[None, :], mask=kept, other=0
    )
    goal = tl.where(kept, goal.to(tl.float32) * target_scale + target_shift, 0.0)
    x = tl.where(kept, x, 0.0)
    positive = 1.0
    if POSITIVE:
        positive = tl.load(pos_weight + safe_columns)[None, :]
    loss, slope = terms(x, goal, positive, parameter, KIND, POSITIVE)
    if WEIGHT == ROWS:
        factor = tl.load(weight + safe_rows)[:, None]
        loss *= factor
        slope *= factor
    elif WEIGHT == ELEMENTS:
        factor = tl.load(
            weight + safe_rows[:, None] * weight_stride + safe_columns[None, :],
            mask=kept,
            other=0.0,
        )
        loss *= factor
        slope *= factor
    loss = tl.where(kept, loss, 0.0)

    # places are counted from the strip's corner, or the compiler would not see them aligned
    strip_rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    strip_columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    height = row_tiles * BLOCK_ROWS
    tl.store(row_parts + column_tile.to(tl.int64) * height + strip_rows, tl.sum(loss, 1))
    if LEAVES == LOSSES:
        places = rows.to(tl.int64)[:, None] * strip_width + columns[None, :]
        tl.store(strip + places, loss, mask=inside_rows[:, None] & inside_columns[None, :])
    elif LEAVES == SLOPES:
        slope = tl.where(kept, slope, 0.0)
        tl.store(
            column_parts + row_tile.to(tl.int64) * strip_width + strip_columns, tl.sum(slope, 0)
        )
        if HAS_FACTORS:
            slope *= tl.load(row_factor + safe_rows)[:, None]
            slope *= tl.load(column_factor + safe_columns)[None, :]
        places = strip + strip_rows.to(tl.int64)[:, None] * strip_width + strip_columns[None, :]
        tl.store(places, slope.to(strip.dtype.element_ty))
