# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernel of top_k: the best of each row so far, merged with those of each tile."""

import triton
import triton.language as tl

from ssl_fast.backends.triton.nearest_kernels import factors, left_chunk, tile_scores

# Below the key of any pair.
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _keys(scores, columns):
    """Numbers whose order is that of (score, column), the smallest first being the largest.

    An fp32 number's bits are in the number's order but for the negative ones, which turn around.
    Minus 0 is made 0 first: they are equal.
    """
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 2147483647, bits).to(tl.int64)
    return ~((ordered << 32) | columns.to(tl.int64))


@triton.jit
def top_k_kernel(
    x,  # [B, N, D]
    others,  # [B, M, D]
    x_scale,  # [B, N] fp32, read with HAS_SCALE
    others_scale,  # [B, M] fp32, read with HAS_SCALE
    half_norms,  # [B, M] fp32
    center,  # [B, D] fp32, read with CENTERED
    indices,  # [B, N, k] int64
    n_rows,
    n_others,
    depth,
    k,
    x_batch_stride,
    x_stride,
    others_batch_stride,
    others_stride,
    HAS_SCALE: tl.constexpr,
    CENTERED: tl.constexpr,
    RESIDENT: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    KEPT: tl.constexpr,
):
    """The indices of the k nearest, k <= KEPT <= BLOCK_COLUMNS, KEPT a power of two.

    A tile without a pair that would join is left at once, which most are once many were seen.
    """
    blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < n_rows
    safe_rows = tl.minimum(rows, n_rows - 1)
    x_rows = x + problem * x_batch_stride + safe_rows.to(tl.int64) * x_stride
    x_factor = factors(x_scale + problem * n_rows, safe_rows, inside, HAS_SCALE)
    center += problem * depth
    steps = tl.arange(0, BLOCK_DEPTH)
    left = left_chunk(x_rows, x_factor, center, steps, depth, CENTERED, EVEN_DEPTH)

    best = tl.full([BLOCK_ROWS, KEPT], NOTHING, dtype=tl.int64)  # descending
    worst = tl.full([BLOCK_ROWS], NOTHING, dtype=tl.int64)
    for column in range(0, n_others, BLOCK_COLUMNS):
        scores = tile_scores(
            left, x_rows, x_factor, others + problem * others_batch_stride,
            others_scale + problem * n_others, half_norms + problem * n_others, center,
            column, n_others, depth, others_stride,
            HAS_SCALE, CENTERED, RESIDENT, EVEN_DEPTH, PRECISION,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip
        columns = column + tl.arange(0, BLOCK_COLUMNS)[None, :]
        keys = tl.where(columns < n_others, _keys(scores, columns), NOTHING)
        if tl.max((keys > worst[:, None]).to(tl.int32)) > 0:
            # of two sequences in opposite order the larger of each pair are the best of both
            of_tile = tl.sort(tl.topk(keys, KEPT), descending=False)
            best = tl.sort(tl.maximum(best, of_tile), descending=True)
            worst = tl.min(best, 1)

    slots = tl.arange(0, KEPT)
    index = (~best) & 2147483647
    places = (problem * n_rows + rows)[:, None] * k + slots[None, :]
    tl.store(indices + places, index, mask=inside[:, None] & (slots < k)[None, :])
