#pragma once
// The three products of a contrastive loss over packed operands, in fp32 and in bfloat16.
//
// Keys are cut into groups of GROUP rows. For a block of LANES queries (a "sub-block") and one
// group:
//   logits:      T [GROUP][LANES]  = K Q^T
//   key sum:     A [D][LANES]     += K^T W      (W the weights, the tile's own output)
//   query sum:   dK [GROUP][D]    += W Q        (over all sub-blocks of a row block)
// A path says how operands are packed and which instruction multiplies them.

#include "cpu/rows.h"
#include "cpu/tile.h"

namespace ssl_fast {
namespace {

// A multiple of both paths' panels. 96 rows of weights for 64 queries are 24 KB: they stay in L1
// from the logits to the key sum.
constexpr int GROUP = 96;

inline int64_t round_up(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}
inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
inline int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// rows [LANES][stride] -> out [columns][LANES]; rows are readable up to whole vectors of columns.
inline void transpose_rows(const float* rows, int64_t stride, int64_t columns, float* out) {
    alignas(64) float tail[WIDTH * WIDTH];
    for (int lane = 0; lane < LANES; lane += WIDTH) {
        const float* from = rows + lane * stride;
        int64_t c = 0;
        for (; c + WIDTH <= columns; c += WIDTH)
            transpose(from + c, stride, out + c * LANES + lane, LANES);
        if (c == columns) continue;
        transpose(from + c, stride, tail, WIDTH);
        for (int64_t k = 0; c + k < columns; ++k)
            store(out + (c + k) * LANES + lane, load(tail + k * WIDTH));
    }
}

// sums [columns][LANES] -> out [LANES][stride], stride at least whole vectors of columns. What lies
// past the columns is not defined.
inline void transpose_sums(const float* sums, int64_t columns, float* out, int64_t stride) {
    alignas(64) float tail[WIDTH * WIDTH];
    for (int lane = 0; lane < LANES; lane += WIDTH) {
        float* to = out + lane * stride;
        int64_t c = 0;
        for (; c + WIDTH <= columns; c += WIDTH)
            transpose(sums + c * LANES + lane, LANES, to + c, stride);
        if (c == columns) continue;
        for (int64_t k = 0; k < WIDTH; ++k)
            store(tail + k * WIDTH,
                  c + k < columns ? load(sums + (c + k) * LANES + lane) : broadcast(0.0f));
        transpose(tail, WIDTH, to + c, stride);
    }
}

// Any dtype, widened while packing; multiplied in fp32. Scales are folded into the packed operands.
struct FloatPath {
    static constexpr bool BF16 = false;
    // The rows of one epilogue, whose logits (6 KB) stay in L1.
    static constexpr int PANEL = 24;
    // Keys side by side in memory: register tiles high for the logits, steps long for the key sum.
    static constexpr int PACK = 6;
    // Steps of the logits at a time: so many rows of queries are 32 KB with AVX-512 and 24 KB with
    // AVX2, and stay in L1 for a panel. A tile costs what 8 steps of AVX2 do to begin and end.
    static constexpr int64_t DEPTH = WIDTH == 16 ? 128 : 384;
    using Weight = float;

    static int64_t depth(int64_t d) { return d; }  // k-steps of the logits
    static int64_t key_sum_rows(int64_t d) { return d; }
    static int64_t packed_key_floats(int64_t m, int64_t d) { return round_up(m, PANEL) * d; }
    static int64_t group_offset(int64_t group, int64_t d) { return group * GROUP * d; }

    // Keys [M, D] -> [M / PACK][D][PACK], which serves both products: the logits step over D, the
    // key sum over the keys.
    static void pack_key(const float* row, float scale, int64_t j, int64_t d, float* packed) {
        float* out = packed + j / PACK * PACK * d + j % PACK;
        for (int64_t e = 0; e < d; ++e) out[e * PACK] = row[e] * scale;
    }
    // A sub-block's rows [LANES][stride], padded to whole vectors -> [D][LANES].
    static void pack_queries(const float* rows, int64_t stride, int64_t d, float* packed) {
        transpose_rows(rows, stride, d, packed);
    }
    // fp32 rows of one [LANES][LANES] block, scaled, as the right operand of the query sum.
    static void pack_weighted(const float* rows, int64_t stride, const float* factor, float* out) {
        for (int i = 0; i < LANES; ++i)
            for (int v = 0; v < LANES; v += WIDTH)
                store(out + i * LANES + v, load(rows + i * stride + v) * broadcast(factor[i]));
    }
    static constexpr int WEIGHTED_FLOATS = LANES * LANES;

    // One panel, from `row` of a group of `rows`.
    static void logits(const float* keys, const float* queries, int, int row, int64_t d,
                       float* out) {
        for (int64_t k = 0; k < d; k += DEPTH) {
            const int steps = static_cast<int>(smaller(DEPTH, d - k));
            for (int r = 0; r < PANEL; r += PACK) {
                const Operands o{
                    keys + (row + r) * d + k * PACK, 0, queries + k * LANES, 0, 1, PACK * d};
                if (k == 0)
                    tile<FloatStep, PACK, 1, PACK, PACK, false>(o, steps, out + r * LANES, LANES);
                else
                    tile<FloatStep, PACK, 1, PACK, PACK, true>(o, steps, out + r * LANES, LANES);
            }
        }
    }
    static void key_sum(const float* keys, const float* weights, int rows, int64_t d, float* sum) {
        product<FloatStep, PACK, 1, 0, true>(
            {keys, PACK * d, weights, PACK * LANES, rows / PACK, 0}, PACK, static_cast<int>(d), sum,
            LANES);
    }
    // weights: [sub-block][GROUP][LANES]; weighted: [sub-block][LANES][LANES].
    static void query_sum(const float* weights, const float* weighted, int sub_blocks, int rows,
                          float* grad, int64_t stride) {
        product<FloatStep, LANES, 1, TILE_ROWS, true>(
            {weights, GROUP * LANES, weighted, WEIGHTED_FLOATS, sub_blocks, TILE_ROWS * LANES},
            LANES, rows, grad, stride);
    }
};

#if defined(__AVX512BF16__)

#if defined(__AMX_BF16__)
// 16 x 16 tiles in 2 x 2 blocks: 4 products for 4 tile loads, which is what the load ports feed.
template <int ROW, bool ACCUMULATE>
__attribute__((noinline)) void bf16_product(const Operands& o, int inner, int rows, float* c,
                                            std::ptrdiff_t c_stride) {
    // GCC's tile intrinsics don't say that they read memory.
    asm volatile("" ::: "memory");
    const int c_bytes = static_cast<int>(c_stride) * 4;
    for (int row = 0; row < rows; row += 32) {
        for (int lane = 0; lane < LANES; lane += 32) {
            float* out = c + row * c_stride + lane;
            if (ACCUMULATE) {
                _tile_loadd(0, out, c_bytes);
                _tile_loadd(1, out + 16, c_bytes);
                _tile_loadd(2, out + 16 * c_stride, c_bytes);
                _tile_loadd(3, out + 16 * c_stride + 16, c_bytes);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int chunk = 0; chunk < o.chunks; ++chunk) {
                const float* a = o.a + chunk * o.a_chunk + row * ROW;
                const float* b = o.b + chunk * o.b_chunk + lane;
                for (int k = 0; k < inner; k += 16) {
                    _tile_loadd(4, a + k, ROW * 4);
                    _tile_loadd(5, a + k + 16 * ROW, ROW * 4);
                    _tile_loadd(6, b + k * LANES, LANES * 4);
                    _tile_loadd(7, b + k * LANES + 16, LANES * 4);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, out, c_bytes);
            _tile_stored(1, out + 16, c_bytes);
            _tile_stored(2, out + 16 * c_stride, c_bytes);
            _tile_stored(3, out + 16 * c_stride + 16, c_bytes);
        }
    }
    asm volatile("" ::: "memory");
}

// Eight tiles of 16 rows of 64 bytes, for the calling thread.
class MatrixUnit {
  public:
    MatrixUnit() {
        alignas(64) uint8_t config[64] = {};
        config[0] = 1;
        for (int t = 0; t < 8; ++t) {
            config[16 + 2 * t] = 64;
            config[48 + t] = 16;
        }
        asm volatile("" ::"r"(config) : "memory");
        _tile_loadconfig(config);
    }
    ~MatrixUnit() { _tile_release(); }
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};
#else
template <int ROW, bool ACCUMULATE>
void bf16_product(const Operands& o, int inner, int rows, float* c, std::ptrdiff_t c_stride) {
    product<Bf16Step, ROW, 1, 0, ACCUMULATE>(o, inner, rows, c, c_stride);
}
class MatrixUnit {};
#endif

inline __m512i interleave(__m256bh even, __m256bh odd) {
    return _mm512_or_si512(
        _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(even)),
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(odd)), 16));
}

// bfloat16 operands are multiplied as given; scales are applied to the fp32 tile. Left operands are
// [chunk of 32][rows][32], right operands pairs of k-steps side by side.
struct Bf16Path {
    static constexpr bool BF16 = true;
    static constexpr int PANEL = 32;
    using Weight = uint16_t;

    static int64_t depth(int64_t d) { return round_up(d, 32) / 2; }
    static int64_t key_sum_rows(int64_t d) { return round_up(d, 32); }
    // The keys for the logits and, transposed, for the key sum.
    static int64_t packed_key_floats(int64_t m, int64_t d) {
        return round_up(m, PANEL) * round_up(d, 32);
    }
    static int64_t group_offset(int64_t group, int64_t d) {
        return group * GROUP * round_up(d, 32);
    }

    // `row` is the padded bfloat16 row; the group's rows are needed for the chunk stride.
    static void pack_key_bits(const uint16_t* row, int64_t j, int64_t rows, int64_t d,
                              float* packed) {
        const int64_t in_group = j % GROUP, padded = round_up(d, 32);
        uint16_t* direct = reinterpret_cast<uint16_t*>(packed + group_offset(j / GROUP, d));
        uint16_t* transposed = direct + rows * padded;
        for (int64_t e = 0; e < padded; e += 32)
            __builtin_memcpy(direct + (e * rows + in_group * 32), row + e, 64);
        uint16_t* column = transposed + in_group / 32 * padded * 32 + in_group % 32;
        for (int64_t e = 0; e < padded; ++e) column[e * 32] = row[e];
    }
    // The rows' bits [LANES][stride in pairs] -> [D / 2][LANES] pairs.
    static void pack_queries(const float* rows, int64_t stride, int64_t d, float* packed) {
        transpose_rows(rows, stride, depth(d), packed);
    }
    static void pack_weighted(const float* rows, int64_t stride, const float* factor, float* out) {
        for (int i = 0; i < LANES; i += 2) {
            const float* even = rows + i * stride;
            const float* odd = even + stride;
            const Vec f_even = broadcast(factor[i]), f_odd = broadcast(factor[i + 1]);
            for (int v = 0; v < LANES; v += WIDTH)
                _mm512_storeu_si512(out + i / 2 * LANES + v,
                                    interleave(_mm512_cvtneps_pbh(load(even + v) * f_even),
                                               _mm512_cvtneps_pbh(load(odd + v) * f_odd)));
        }
    }
    static constexpr int WEIGHTED_FLOATS = LANES * LANES / 2;

    static void logits(const float* keys, const float* queries, int rows, int row, int64_t d,
                       float* out) {
        bf16_product<16, false>({keys + row * 16, rows * 16, queries, 16 * LANES,
                                 static_cast<int>(round_up(d, 32) / 32), 0},
                                16, PANEL, out, LANES);
    }
    static void key_sum(const float* keys, const float* weights, int rows, int64_t d, float* sum) {
        const int64_t padded = round_up(d, 32);
        bf16_product<16, true>(
            {keys + rows * padded / 2, padded * 16, weights, 16 * LANES, rows / 32, 0}, 16,
            static_cast<int>(padded), sum, LANES);
    }
    static void query_sum(const uint16_t* weights, const float* weighted, int sub_blocks, int rows,
                          float* grad, int64_t stride) {
        bf16_product<LANES / 2, true>({reinterpret_cast<const float*>(weights), GROUP * LANES / 2,
                                       weighted, WEIGHTED_FLOATS, sub_blocks, 0},
                                      LANES / 2, rows, grad, stride);
    }
};

#endif

}  // namespace
}  // namespace ssl_fast
