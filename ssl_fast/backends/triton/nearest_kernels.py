# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernels of nearest, and what top_k shares with them.

With u_i = x_scale_i x_i and v_k = centroid_scale_k c_k, row i's order of the centroids is that of
1/2|v_k|^2 - u_i.v_k. 16-bit rows are multiplied as given and scaled in the fp32 tile. fp32 rows are
scaled, and moved by ``center``, near the centroids' mean, before they are multiplied: far from the
origin the square would swallow the difference. One dimension of the grid, since the others of CUDA
hold 65535 blocks and a batch may hold more problems: program = problem * blocks + block.
"""

import triton
import triton.language as tl

from ssl_fast.backends.triton.tiles import load_chunk, multiply


@triton.jit
def factors(scale, places, inside, HAS_SCALE: tl.constexpr):
    """Scales in fp32; 1 without, and where there is no row."""
    if HAS_SCALE:
        found = tl.load(scale + places, mask=inside, other=1.0)
    else:
        found = tl.where(inside, 1.0, 1.0)
    return found


@triton.jit
def left_chunk(rows, factor, center, steps, depth, CENTERED: tl.constexpr, EVEN: tl.constexpr):
    """A chunk of rows, [rows, steps]; zeros beyond the depth."""
    chunk = load_chunk(rows[:, None] + steps[None, :], (steps < depth)[None, :], EVEN)
    if CENTERED:
        chunk = chunk * factor[:, None] - load_chunk(center + steps, steps < depth, EVEN)[None, :]
    return chunk


@triton.jit
def right_chunk(rows, factor, center, steps, depth, CENTERED: tl.constexpr, EVEN: tl.constexpr):
    """The same for the other side, [steps, rows]."""
    chunk = load_chunk(rows[None, :] + steps[:, None], (steps < depth)[:, None], EVEN)
    if CENTERED:
        chunk = chunk * factor[None, :] - load_chunk(center + steps, steps < depth, EVEN)[:, None]
    return chunk


@triton.jit
def tile_scores(
    left,  # [BLOCK_ROWS, BLOCK_DEPTH], read with RESIDENT
    x_rows,  # [BLOCK_ROWS] pointers
    x_factor,  # [BLOCK_ROWS]
    others,  # pointer to row 0
    others_scale,
    half_norms,
    center,
    column,
    n_others,
    depth,
    others_stride,
    HAS_SCALE: tl.constexpr,
    CENTERED: tl.constexpr,
    RESIDENT: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """1/2|v_k|^2 - u_i.v_k of a tile; infinite where there is no row, and where it is NaN."""
    columns = column + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < n_others
    safe_columns = tl.minimum(columns, n_others - 1)
    rows = others + safe_columns.to(tl.int64) * others_stride
    factor = factors(others_scale, columns, inside, HAS_SCALE)
    products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    if RESIDENT:
        steps = tl.arange(0, BLOCK_DEPTH)
        right = right_chunk(rows, factor, center, steps, depth, CENTERED, EVEN_DEPTH)
        products = multiply(left, right, products, PRECISION)
    else:
        for start in range(0, depth, BLOCK_DEPTH):
            steps = start + tl.arange(0, BLOCK_DEPTH)
            part = left_chunk(x_rows, x_factor, center, steps, depth, CENTERED, EVEN_DEPTH)
            right = right_chunk(rows, factor, center, steps, depth, CENTERED, EVEN_DEPTH)
            products = multiply(part, right, products, PRECISION)
    if HAS_SCALE and not CENTERED:
        products = products * x_factor[:, None] * factor[None, :]
    half = tl.load(half_norms + columns, mask=inside, other=float("inf"))
    scores = half[None, :] - products
    return tl.where(scores < float("inf"), scores, float("inf"))


@triton.jit
def half_norms_kernel(
    rows,  # [B, N, D]
    scale,  # [B, N] fp32, read with HAS_SCALE
    center,  # [B, D] fp32, read with CENTERED
    half_norms,  # [B, N] fp32
    n_rows,
    depth,
    batch_stride,
    row_stride,
    HAS_SCALE: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """1/2|v|^2 of each row in fp32."""
    blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    places = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = places < n_rows
    safe = tl.minimum(places, n_rows - 1)
    pointers = rows + problem * batch_stride + safe.to(tl.int64) * row_stride
    factor = factors(scale + problem * n_rows, safe, inside, HAS_SCALE)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        steps = start + tl.arange(0, BLOCK_DEPTH)
        kept = steps < depth
        chunk = tl.load(pointers[:, None] + steps[None, :], mask=kept[None, :], other=0.0)
        chunk = chunk.to(tl.float32) * factor[:, None]
        if CENTERED:
            moved = tl.load(center + problem * depth + steps, mask=kept, other=0.0)
            chunk = chunk - moved[None, :]
        total += tl.sum(chunk * chunk, 1)
    tl.store(half_norms + problem * n_rows + places, 0.5 * total, mask=inside)


@triton.jit(do_not_specialize=["error"])
def nearest_kernel(
    x,  # [B, N, D]
    others,  # [B, K, D]
    x_scale,  # [B, N] fp32, read with HAS_SCALE
    others_scale,  # [B, K] fp32, read with HAS_SCALE
    half_norms,  # [B, K] fp32
    largest,  # [B] fp32, the largest of the half norms, read with CERTIFY
    center,  # [B, D] fp32, read with CENTERED
    lengths,  # [B] int64, read with RAGGED
    labels,  # [B, N] int64
    unsure,  # [B N] int64, the rows to score again, written with CERTIFY
    unsure_count,  # [1] int64
    error,  # of a score, by |u||v| + 1/2|v|^2
    n_rows,
    n_others,
    depth,
    x_batch_stride,
    x_stride,
    others_batch_stride,
    others_stride,
    HAS_SCALE: tl.constexpr,
    CENTERED: tl.constexpr,
    RAGGED: tl.constexpr,
    CERTIFY: tl.constexpr,
    RESIDENT: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """The labels of a block of rows; with CERTIFY also which of them rounding may have decided.

    A row whose two best scores are closer than their error joins ``unsure``. So does one with a
    score that is no number, or beyond fp32.
    """
    blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    count = n_rows
    if RAGGED:
        count = tl.minimum(tl.maximum(tl.load(lengths + problem), 0), n_rows).to(tl.int32)
    inside = rows < count
    safe_rows = tl.minimum(rows, n_rows - 1)
    x_rows = x + problem * x_batch_stride + safe_rows.to(tl.int64) * x_stride
    x_factor = factors(x_scale + problem * n_rows, safe_rows, inside, HAS_SCALE)
    center += problem * depth
    steps = tl.arange(0, BLOCK_DEPTH)
    left = left_chunk(x_rows, x_factor, center, steps, depth, CENTERED, EVEN_DEPTH)

    best = tl.full([BLOCK_ROWS], float("inf"), dtype=tl.float32)
    second = tl.full([BLOCK_ROWS], float("inf"), dtype=tl.float32)
    label = tl.zeros([BLOCK_ROWS], dtype=tl.int32)
    for column in range(0, n_others, BLOCK_COLUMNS):
        scores = tile_scores(
            left, x_rows, x_factor, others + problem * others_batch_stride,
            others_scale + problem * n_others, half_norms + problem * n_others, center,
            column, n_others, depth, others_stride,
            HAS_SCALE, CENTERED, RESIDENT, EVEN_DEPTH, PRECISION,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip
        places = tl.arange(0, BLOCK_COLUMNS)[None, :]
        least = tl.min(scores, 1)
        place = tl.min(tl.where(scores == least[:, None], places, BLOCK_COLUMNS), 1)
        if CERTIFY:
            others_least = tl.min(tl.where(places == place[:, None], float("inf"), scores), 1)
            second = tl.minimum(tl.minimum(second, others_least), tl.maximum(best, least))
        label = tl.where(least < best, column + place, label)
        best = tl.minimum(best, least)

    if CERTIFY:
        square = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
        for start in range(0, depth, BLOCK_DEPTH):
            steps = start + tl.arange(0, BLOCK_DEPTH)
            part = left_chunk(x_rows, x_factor, center, steps, depth, CENTERED, EVEN_DEPTH)
            part = part.to(tl.float32)
            square += tl.sum(part * part, 1)
        norm = tl.sqrt(square)
        if HAS_SCALE and not CENTERED:
            norm = norm * x_factor
        half = tl.load(largest + problem)
        # the last term stands for products that vanish below fp32's smallest normal number
        margin = 2.0 * error * (norm * tl.sqrt(2.0 * half) + half) + depth * 2.0**-125
        doubtful = inside & ((second - best > margin) == 0)
        amount = tl.sum(doubtful.to(tl.int32), 0)
        if amount > 0:
            # the order in which blocks come by changes no result: each row is its own
            first = tl.atomic_add(unsure_count, amount.to(tl.int64))
            slots = first + tl.cumsum(doubtful.to(tl.int32), 0) - 1
            tl.store(unsure + slots, problem * n_rows + rows, mask=doubtful)
    label = tl.where(inside, label, -1)
    tl.store(labels + problem * n_rows + rows, label.to(tl.int64), mask=rows < n_rows)


@triton.jit
def rescore_kernel(
    x,  # [B, N, D]
    others,  # [B, K, D]
    x_scale,  # [B, N] fp32, read with HAS_SCALE
    others_scale,  # [B, K] fp32, read with HAS_SCALE
    unsure,  # [B N] int64, the first unsure_count[0] of them
    unsure_count,  # [1] int64
    labels,  # [B, N] int64
    n_rows,
    n_others,
    depth,
    x_batch_stride,
    x_stride,
    others_batch_stride,
    others_stride,
    HAS_SCALE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """The labels of the rows in doubt from differences in float64, a row at a time."""
    for entry in range(tl.program_id(0), tl.load(unsure_count), tl.num_programs(0)):
        flat = tl.load(unsure + entry)
        problem = flat // n_rows
        x_row = x + problem * x_batch_stride + (flat % n_rows) * x_stride
        first_other = others + problem * others_batch_stride
        best = tl.full([], float("inf"), dtype=tl.float64)
        label = tl.full([], 0, dtype=tl.int32)
        for column in range(0, n_others, BLOCK_COLUMNS):
            columns = column + tl.arange(0, BLOCK_COLUMNS)
            inside = columns < n_others
            rows = first_other + tl.minimum(columns, n_others - 1).to(tl.int64) * others_stride
            total = tl.zeros([BLOCK_COLUMNS], dtype=tl.float64)
            for start in range(0, depth, BLOCK_DEPTH):
                steps = start + tl.arange(0, BLOCK_DEPTH)
                kept = steps < depth
                u = tl.load(x_row + steps, mask=kept, other=0.0).to(tl.float32).to(tl.float64)
                v = tl.load(rows[:, None] + steps[None, :], mask=kept[None, :], other=0.0)
                v = v.to(tl.float32).to(tl.float64)
                if HAS_SCALE:
                    u = u * tl.load(x_scale + flat).to(tl.float64)
                    factor = tl.load(others_scale + problem * n_others + columns, mask=inside)
                    v = v * factor.to(tl.float64)[:, None]
                difference = u[None, :] - v
                total += tl.sum(difference * difference, 1)
            total = tl.where(inside & (total < float("inf")), total, float("inf"))
            least = tl.min(total, 0)
            place = tl.min(tl.where(total == least, columns, 2147483647), 0)
            label = tl.where(least < best, place, label)
            best = tl.minimum(best, least)
        tl.store(labels + flat, label.to(tl.int64))


@triton.jit
def distances_kernel(
    x,  # [B, N, D]
    others,  # [B, M, D]
    x_scale,  # [B, N] fp32, read with HAS_SCALE
    others_scale,  # [B, M] fp32, read with HAS_SCALE
    indices,  # [B, N, width] int64
    squared,  # [B, N, width] fp32
    n_rows,
    n_others,
    depth,
    pairs,  # N width
    width,
    x_batch_stride,
    x_stride,
    others_batch_stride,
    others_stride,
    HAS_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """|u_i - v_j|^2 from differences at the pairs named by the indices; 0 at a negative index."""
    blocks = tl.cdiv(pairs, BLOCK_ROWS)
    program = tl.program_id(0).to(tl.int64)
    problem = program // blocks
    places = (program % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = places < pairs
    row = tl.minimum(places, pairs - 1) // width
    index = tl.load(indices + problem * pairs + places, mask=inside, other=-1)
    inside = index >= 0
    x_rows = x + problem * x_batch_stride + row * x_stride
    other_rows = others + problem * others_batch_stride + index * others_stride
    x_factor = factors(x_scale + problem * n_rows, row, inside, HAS_SCALE)
    factor = factors(others_scale + problem * n_others, index, inside, HAS_SCALE)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        steps = start + tl.arange(0, BLOCK_DEPTH)
        kept = inside[:, None] & (steps < depth)[None, :]
        u = tl.load(x_rows[:, None] + steps[None, :], mask=kept, other=0.0).to(tl.float32)
        v = tl.load(other_rows[:, None] + steps[None, :], mask=kept, other=0.0).to(tl.float32)
        if HAS_SCALE:
            u = u * x_factor[:, None]
            v = v * factor[:, None]
        total += tl.sum((u - v) * (u - v), 1)
    tl.store(squared + problem * pairs + places, total, mask=places < pairs)
