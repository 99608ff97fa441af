# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""What every sweep over Q Kᵀ does with a tile: multiply, and leave out pairs by their position."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# The reference's IGNORED_ID.
IGNORED_ID = tl.constexpr(-(2**63))


@triton.jit
def key_tiles(row, split, n_keys, TRIANGLE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The tiles of keys that one split of a block of rows walks over."""
    tiles = tl.cdiv(n_keys, BLOCK_COLUMNS)
    first = row // BLOCK_COLUMNS if TRIANGLE else 0
    share = tl.cdiv(tiles - first, tl.num_programs(1))
    begin = first + split * share
    return begin, tl.minimum(begin + share, tiles)


@triton.jit
def load_chunk(places, inside, EVEN: tl.constexpr):
    """A chunk of rows, zeros beyond the depth; EVEN: none of it lies beyond."""
    return tl.load(places) if EVEN else tl.load(places, mask=inside, other=0.0)


@triton.jit
def multiply(left, right, products, PRECISION: tl.constexpr):
    """The fp32 sum of products and left @ right; PRECISION is tl.dot's, or "widened"."""
    if PRECISION == "widened":
        # the interpreter keeps bf16 as integers, and tl.dot there would multiply those
        left = left.to(tl.float32)
        right = right.to(tl.float32)
        products = tl.dot(left, right, products, input_precision="ieee")
    else:
        products = tl.dot(left, right, products, input_precision=PRECISION)
    return products


@triton.jit
def tile_products(
    query_rows,  # [BLOCK_ROWS] pointers
    key_rows,  # [BLOCK_COLUMNS] pointers
    depth,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """The fp32 tile of Q Kᵀ, summed over chunks of the depth."""
    products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        steps = start + tl.arange(0, BLOCK_DEPTH)
        left = load_chunk(
            query_rows[:, None] + steps[None, :], (steps < depth)[None, :], EVEN_DEPTH
        )
        right = load_chunk(key_rows[None, :] + steps[:, None], (steps < depth)[:, None], EVEN_DEPTH)
        products = multiply(left, right, products, PRECISION)
    return products


@triton.jit
def _touches(row, column, offset, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Whether the diagonal column - row == offset crosses the tile at (row, column)."""
    return (row + offset < column + BLOCK_COLUMNS) & (row + offset + BLOCK_ROWS > column)


@triton.jit
def needs_rules(
    row,
    column,
    row_end,
    n_keys,
    diagonal_0,
    diagonal_1,
    diagonal_2,
    DIAGONALS: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Whether the tile holds a tail or a pair that a rule excludes: most tiles skip the masks."""
    needed = (column + BLOCK_COLUMNS > n_keys) | (row + BLOCK_ROWS > row_end)
    if DIAGONALS > 0:
        needed = needed | _touches(row, column, diagonal_0, BLOCK_ROWS, BLOCK_COLUMNS)
    if DIAGONALS > 1:
        needed = needed | _touches(row, column, diagonal_1, BLOCK_ROWS, BLOCK_COLUMNS)
    if DIAGONALS > 2:
        needed = needed | _touches(row, column, diagonal_2, BLOCK_ROWS, BLOCK_COLUMNS)
    if TRIANGLE:
        needed = needed | (column < row + BLOCK_ROWS)
    return needed


@triton.jit
def kept_pairs(
    rows,
    columns,
    row_end,
    n_keys,
    diagonal_0,
    diagonal_1,
    diagonal_2,
    DIAGONALS: tl.constexpr,
    TRIANGLE: tl.constexpr,
):
    """The pairs of a tile that stay in the softmax, by position."""
    kept = (rows < row_end)[:, None] & (columns < n_keys)[None, :]
    distance = columns[None, :] - rows[:, None]
    if DIAGONALS > 0:
        kept = kept & (distance != diagonal_0)
    if DIAGONALS > 1:
        kept = kept & (distance != diagonal_1)
    if DIAGONALS > 2:
        kept = kept & (distance != diagonal_2)
    if TRIANGLE:
        kept = kept & (distance > 0)
    return kept


@triton.jit
def ids_exclude(
    query_ids,  # [N, IDS] int64
    key_ids,  # [M, IDS] int64
    rows,  # [BLOCK_ROWS], none beyond the last
    columns,  # [BLOCK_COLUMNS], none beyond the last
    IDS: tl.constexpr,
    MATCHING: tl.constexpr,
):
    """The pairs of a tile that leave the softmax for their ids; MATCHING: those without a match."""
    row_id = tl.load(query_ids + rows.to(tl.int64) * IDS)
    column_id = tl.load(key_ids + columns.to(tl.int64) * IDS)
    equal = row_id[:, None] == column_id[None, :]
    ignored = (row_id == IGNORED_ID)[:, None] | (column_id == IGNORED_ID)[None, :]
    if IDS > 1:
        row_id = tl.load(query_ids + rows.to(tl.int64) * IDS + 1)
        column_id = tl.load(key_ids + columns.to(tl.int64) * IDS + 1)
        equal = equal | (row_id[:, None] == column_id[None, :])
        ignored = ignored | (row_id == IGNORED_ID)[:, None] | (column_id == IGNORED_ID)[None, :]
    return ignored | (equal != MATCHING)
