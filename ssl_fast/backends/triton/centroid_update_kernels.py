# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernel of centroid_update: sums over runs of rows that are sorted by cluster."""

import triton
import triton.language as tl


@triton.jit
def segment_sums_kernel(
    x,  # [B, N, D]
    order,  # [B N] int64: the rows, sorted by cluster
    bounds,  # [B K + 1] int64: where each cluster's rows begin in the order
    x_scale,  # [B N] fp32, read with HAS_SCALE
    weight,  # [B N] fp32, read with HAS_WEIGHT
    sums,  # [parts, B K, D] fp64
    counts,  # [parts, B K] fp64
    n_rows,
    n_segments,
    depth,
    batch_stride,
    row_stride,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One part of one cluster's rows, in a block of columns.

    The cluster is the grid's first dimension, (cluster, part): the others hold 65535 blocks.
    """
    depth_blocks = tl.cdiv(depth, BLOCK_DEPTH)
    program = tl.program_id(0).to(tl.int64)
    depth_block = program % depth_blocks
    segment = program // depth_blocks
    part = tl.program_id(1)
    steps = depth_block * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    begin = tl.load(bounds + segment)
    end = tl.load(bounds + segment + 1)
    share = tl.cdiv(end - begin, tl.num_programs(1))
    begin = tl.minimum(begin + part * share, end)
    end = tl.minimum(begin + share, end)

    total = tl.zeros([BLOCK_DEPTH], dtype=tl.float64)
    count = tl.full([], 0.0, dtype=tl.float64)
    for start in range(begin, end, BLOCK_ROWS):
        places = start + tl.arange(0, BLOCK_ROWS)
        inside = places < end
        row = tl.load(order + places, mask=inside, other=0)
        pointers = x + (row // n_rows) * batch_stride + (row % n_rows) * row_stride
        kept = inside[:, None] & (steps < depth)[None, :]
        values = tl.load(pointers[:, None] + steps[None, :], mask=kept, other=0.0)
        values = values.to(tl.float32).to(tl.float64)
        factor = inside.to(tl.float64)
        if HAS_WEIGHT:
            factor = tl.load(weight + row, mask=inside, other=0.0).to(tl.float64)
        count += tl.sum(factor, 0)
        if HAS_SCALE:
            factor = factor * tl.load(x_scale + row, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(values * factor[:, None], 0)

    place = part.to(tl.int64) * n_segments + segment
    tl.store(sums + place * depth + steps, total, mask=steps < depth)
    if depth_block == 0:
        tl.store(counts + place, count)
