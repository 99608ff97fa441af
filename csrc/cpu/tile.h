#pragma once
// The register tile: C[rows][LANES] (+)= A[rows][k] * B[k][LANES], k innermost.
//
// One k-step is four bytes of A broadcast against VECTORS vectors of B: one float, or a pair of
// bfloat16 (vdpbf16ps). Both operands are packed, so that all three products of a contrastive loss
// (logits, weights times keys, weights times queries) are the same loop with other strides.
//
// 6 rows of 4 vectors use 24 of AVX-512's registers as accumulators and load 10 times for 24
// multiply-adds: about 98% of the FMA peak of an Intel Xeon with AMX (operands in L1), where 12
// rows of 2 vectors (14 loads) reach 93%.

#include <cstddef>
#include <cstdint>

#include "cpu/vec.h"

namespace ssl_fast {
namespace {

// Where the operands of one product lie. Strides count four-byte k-steps; k is `chunks` times the
// INNER steps of a chunk.
struct Operands {
    const float* a;  // rows at distance ROW, k-steps at distance STEP
    std::ptrdiff_t a_chunk;
    const float* b;  // [inner][LANES] per chunk
    std::ptrdiff_t b_chunk;
    int chunks;
    // From a chunk of A to what is wanted next, which each k-step prefetches AHEAD floats of.
    std::ptrdiff_t ahead;
};

struct FloatStep {
    static Vec apply(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Bf16Step {
    static Vec apply(Vec a, Vec b, Vec c) {
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
};
#endif

// Not inlined: GCC spills accumulators where it merges the tile with a caller's loop.
template <class Step, int ROWS, int ROW, int STEP, int AHEAD, bool ACCUMULATE>
__attribute__((noinline)) void tile(const Operands& o, int inner, float* c,
                                    std::ptrdiff_t c_stride) {
    Vec sum[ROWS][VECTORS];
    // Results are stored when the tile is done, or loaded when the next one begins.
    const float* results = ACCUMULATE ? c + ROWS * c_stride : c;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS * WIDTH; v += 16)
            __builtin_prefetch(results + r * c_stride + v, 1, 3);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
            sum[r][v] = ACCUMULATE ? load(c + r * c_stride + v * WIDTH) : broadcast(0.0f);
    }
    for (int chunk = 0; chunk < o.chunks; ++chunk) {
        const float* a = o.a + chunk * o.a_chunk;
        const float* b = o.b + chunk * o.b_chunk;
        const float* b_end = b + static_cast<std::ptrdiff_t>(inner) * LANES;
        const float* next = a + o.ahead;
        // Rolled on purpose: the loop of one k-step fits the loop buffer; unrolled by 4 it is 8%
        // slower.
#pragma GCC unroll 1
        for (; b != b_end; b += LANES, a += STEP, next += AHEAD) {
            if (AHEAD > 0) __builtin_prefetch(next, 0, 3);
            Vec row[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) row[v] = load(b + v * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const Vec value = keep_in_register(broadcast(a[r * ROW]));
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) sum[r][v] = Step::apply(value, row[v], sum[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(c + r * c_stride + v * WIDTH, sum[r][v]);
    }
}

// The tile of `height` rows, TILE_ROWS at most.
template <class Step, int ROW, int STEP, int AHEAD, bool ACCUMULATE>
void tile_of(const Operands& o, int inner, int height, float* c, std::ptrdiff_t c_stride) {
    static_assert(TILE_ROWS == 6, "the cases below");
    switch (height) {
        case 1: tile<Step, 1, ROW, STEP, AHEAD, ACCUMULATE>(o, inner, c, c_stride); break;
        case 2: tile<Step, 2, ROW, STEP, AHEAD, ACCUMULATE>(o, inner, c, c_stride); break;
        case 3: tile<Step, 3, ROW, STEP, AHEAD, ACCUMULATE>(o, inner, c, c_stride); break;
        case 4: tile<Step, 4, ROW, STEP, AHEAD, ACCUMULATE>(o, inner, c, c_stride); break;
        case 5: tile<Step, 5, ROW, STEP, AHEAD, ACCUMULATE>(o, inner, c, c_stride); break;
        default: tile<Step, 6, ROW, STEP, AHEAD, ACCUMULATE>(o, inner, c, c_stride); break;
    }
}

// All rows of C, in register tiles of nearly equal height: a short tile has too few accumulators
// to hide the multiply-add's latency.
template <class Step, int ROW, int STEP, int AHEAD, bool ACCUMULATE>
void product(Operands o, int inner, int rows, float* c, std::ptrdiff_t c_stride) {
    for (int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS; tiles > 0; --tiles) {
        const int height = (rows + tiles - 1) / tiles;
        tile_of<Step, ROW, STEP, AHEAD, ACCUMULATE>(o, inner, height, c, c_stride);
        o.a += height * ROW;
        c += height * c_stride;
        rows -= height;
    }
}

}  // namespace
}  // namespace ssl_fast
