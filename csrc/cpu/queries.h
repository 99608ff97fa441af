#pragma once
// LANES rows of x, packed beside the centroids that they are scored against, and exact distances.

#include "cpu/centroids.h"

namespace ssl_fast {
namespace {

// Columns that are staged at a time on their way into the packed block: 32 KB with 64 lanes.
constexpr int64_t STAGE = 128;

// Packed rows that share a pass over the centroids, and the centroids between two changes of the
// row block: both stay in an L2 of 1 MB.
constexpr int64_t UNIT_BYTES = int64_t{200} << 10, GROUP_BYTES = int64_t{256} << 10;
constexpr int64_t MAX_UNIT = 8;

inline int64_t unit_blocks(int64_t d) {
    return smaller(MAX_UNIT, larger(1, UNIT_BYTES / (d * LANES * 4)));
}
template <class Path>
int64_t group_panels(int64_t d) {
    return larger(1, GROUP_BYTES / 4 / panel_floats<Path>(d));
}
// Rows of a packed block on either path.
inline int64_t query_depth(int64_t d) { return larger(d, round_up(d, 32) / 2); }

// From here on squares overflow, or are about to.
constexpr float HUGE_SQUARE = 1e36f, HUGE_SCORE = 1e37f;

struct Queries {
    float* packed;                    // [depth][LANES]
    alignas(64) float scale[LANES];   // of bfloat16 products
    alignas(64) float square[LANES];  // |u|^2
    alignas(64) float prefix[LANES];  // as Norms::prefix
};

// Which rows: `ids`, or `count` from `first` on.
struct Selection {
    int64_t first;
    const int64_t* ids;
    int count;
    int64_t operator[](int lane) const { return ids == nullptr ? first + lane : ids[lane]; }
};

// Four-byte columns [begin, end) of the rows by way of `staged` [LANES][STAGE].
template <class Path>
void stage_columns(const Rows& x, Dtype dtype, const Selection& rows, int64_t d, int64_t begin,
                   int64_t end, float* staged, float* packed) {
    constexpr int64_t EACH = Path::BF16 ? 2 : 1;  // elements of a four-byte column
    for (int64_t c = begin; c < end; c += STAGE) {
        const int64_t width = smaller(STAGE, end - c);
        const int64_t elements = larger(0, smaller(width * EACH, d - c * EACH));
        const Rows from{static_cast<const char*>(x.data) + c * EACH * element_size(dtype),
                        x.stride};
        const int64_t padded = round_up(width, WIDTH) * 4;
        for (int lane = 0; lane < LANES; ++lane) {
            float* to = staged + lane * STAGE;
            int64_t bytes = 0;
            if (lane < rows.count && elements > 0) {
                if constexpr (Path::BF16) {
                    bytes = elements * 2;
                    __builtin_memcpy(to, row_at(from, dtype, rows[lane]), bytes);
                } else {
                    bytes = elements * 4;
                    const float* row = widen(from, dtype, rows[lane], elements, to);
                    if (row != to) __builtin_memcpy(to, row, bytes);
                }
            }
            __builtin_memset(reinterpret_cast<char*>(to) + bytes, 0, padded - bytes);
        }
        transpose_rows(staged, STAGE, width, packed + c * LANES);
    }
}

// Scale, anchor and norms on the packed block.
template <bool PLAIN>
void finish_float(const Centroids& c, Queries& q) {
    Vec square[VECTORS], prefix[VECTORS], scale[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        square[v] = prefix[v] = broadcast(0.0f);
        scale[v] = load(q.scale + v * WIDTH);
    }
    for (int64_t e = 0; e < c.d;) {
        for (const int64_t end = smaller(e + PREFIX, c.d); e < end; ++e) {
            float* column = q.packed + e * LANES;
            const Vec anchor = broadcast(c.anchored ? -c.anchor[e] : 0.0f);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                Vec u = load(column + v * WIDTH);
                if (!PLAIN) {
                    u = fma(u, scale[v], anchor);
                    store(column + v * WIDTH, u);
                }
                square[v] = fma(u, u, square[v]);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) prefix[v] = prefix[v] + square[v];
    }
    const Vec columns = broadcast(static_cast<float>(smaller(PREFIX, c.d)));
    for (int v = 0; v < VECTORS; ++v) {
        store(q.square + v * WIDTH, square[v]);
        store(q.prefix + v * WIDTH, prefix[v] * columns);
    }
}

#if defined(__AVX512BF16__)
inline void finish_bf16(const Centroids& c, Queries& q) {
    Vec square[VECTORS], prefix[VECTORS];
    for (int v = 0; v < VECTORS; ++v) square[v] = prefix[v] = broadcast(0.0f);
    const int64_t depth = Bf16Path::depth(c.d);
    for (int64_t e = 0; e < depth; e += PREFIX / 2) {
        for (int64_t p = e; p < e + PREFIX / 2; ++p) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                const __m512bh pair =
                    reinterpret_cast<__m512bh>(load(q.packed + p * LANES + v * WIDTH));
                square[v] = _mm512_dpbf16_ps(square[v], pair, pair);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) prefix[v] = prefix[v] + square[v];
    }
    const Vec columns = broadcast(static_cast<float>(PREFIX));
    for (int v = 0; v < VECTORS; ++v) {
        // A scale of 0 makes any finite row 0, also one whose square overflows.
        const Vec scale = load(q.scale + v * WIDTH), zero = broadcast(0.0f);
        store(q.square + v * WIDTH, select_greater(scale, zero, square[v] * scale * scale, zero));
        store(q.prefix + v * WIDTH,
              select_greater(scale, zero, prefix[v] * columns * scale * scale, zero));
    }
}
#endif

// The rows as they are, and their scales.
template <class Path>
void load_queries(const Rows& x, Dtype dtype, const float* x_scale, const Selection& rows,
                  int64_t d, float* staged, float* packed, float* scale) {
    for (int lane = 0; lane < LANES; ++lane)
        scale[lane] = x_scale != nullptr && lane < rows.count ? x_scale[rows[lane]] : 1.0f;
    int64_t direct = 0;
    if (dtype == Dtype::float32 && rows.ids == nullptr && rows.count == LANES) {
        direct = d / WIDTH * WIDTH;
        transpose_rows(reinterpret_cast<const float*>(row_at(x, dtype, rows.first)), x.stride,
                       direct, packed);
    }
    stage_columns<Path>(x, dtype, rows, d, direct, Path::depth(d), staged, packed);
}

template <class Path>
void pack_queries(const Rows& x, Dtype dtype, const float* x_scale, const Selection& rows,
                  const Centroids& c, float* staged, Queries& q) {
    load_queries<Path>(x, dtype, x_scale, rows, c.d, staged, q.packed, q.scale);
    if constexpr (Path::BF16) {
#if defined(__AVX512BF16__)
        finish_bf16(c, q);
#endif
    } else if (x_scale == nullptr && !c.anchored) {
        finish_float<true>(c, q);
    } else {
        finish_float<false>(c, q);
    }
}

// Rows that are wanted next, fetched a few cache lines at a time while others are multiplied: a
// block of rows is transposed faster than memory delivers it.
class Ahead {
  public:
    Ahead(const Rows& x, Dtype dtype, int64_t first, int64_t end, int64_t d)
        : row_(row_at(x, dtype, first)),
          stride_(x.stride * element_size(dtype)),
          bytes_(d * element_size(dtype)),
          rows_(larger(0, end - first)) {}
    int64_t lines() const { return rows_ * ceil_div(bytes_, 64); }
    void fetch(int64_t lines) {
        for (; lines > 0 && rows_ > 0; --lines) {
            __builtin_prefetch(row_ + at_, 0, 2);
            if ((at_ += 64) < bytes_) continue;
            at_ = 0;
            row_ += stride_;
            --rows_;
        }
    }

  private:
    const char* row_;
    int64_t stride_, bytes_, rows_, at_ = 0;
};

// Of row r of a panel's products, which is centroid k + r, and the lanes from v on.
template <bool SCALED>
Vec score(const Centroids& c, int64_t k, int r, int v, const float* tile, const Queries& q) {
    const Vec t = load(tile + r * LANES + v), half = broadcast(c.half[k + r]);
    if (!SCALED) return t - half;
    return fma(t * broadcast(c.scale[k + r]), load(q.scale + v), -half);
}

template <bool SCALED>
float sum_of_squares(const float* x, float x_scale, const float* y, float y_scale, int64_t d) {
    const Vec xs = broadcast(x_scale), ys = broadcast(y_scale);
    Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    // Both products are rounded, so that equal rows have distance 0.
    const auto difference = [&](Vec a, Vec b) {
        return SCALED ? keep_in_register(a * xs) - keep_in_register(b * ys) : a - b;
    };
    int64_t e = 0;
    for (; e + 4 * WIDTH <= d; e += 4 * WIDTH)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Vec t = difference(load(x + e + v * WIDTH), load(y + e + v * WIDTH));
            sums[v] = fma(t, t, sums[v]);
        }
    for (; e + WIDTH <= d; e += WIDTH) {
        const Vec t = difference(load(x + e), load(y + e));
        sums[0] = fma(t, t, sums[0]);
    }
    if (e < d) {
        alignas(64) float last[2][WIDTH] = {};
        __builtin_memcpy(last[0], x + e, (d - e) * sizeof(float));
        __builtin_memcpy(last[1], y + e, (d - e) * sizeof(float));
        const Vec t = difference(load(last[0]), load(last[1]));
        sums[1] = fma(t, t, sums[1]);
    }
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// |x_scale x - y_scale y|^2 from differences, which keeps the digits of a small one.
inline float squared_distance(const float* x, float x_scale, const float* y, float y_scale,
                              int64_t d) {
    // The same bits: a product with 1 is exact.
    if (x_scale == 1.0f && y_scale == 1.0f) return sum_of_squares<false>(x, 1.0f, y, 1.0f, d);
    return sum_of_squares<true>(x, x_scale, y, y_scale, d);
}

// What differences, squares and the sum of a squared distance are rounded by, in proportion: each
// lane adds a (4 * WIDTH)th of the columns.
inline float distance_error(int64_t d) {
    return 6.5e-8f * (16.0f + static_cast<float>(d) / (4 * WIDTH));
}

// The same in double, for rows that fp32 can't decide.
inline double exact_distance(const float* x, float x_scale, const float* y, float y_scale,
                             int64_t d) {
    constexpr int PARTS = 16;
    double sums[PARTS] = {};
    const double xs = x_scale, ys = y_scale;
    int64_t e = 0;
    for (; e + PARTS <= d; e += PARTS)
        for (int p = 0; p < PARTS; ++p) {
            const double t = xs * x[e + p] - ys * y[e + p];
            sums[p] += t * t;
        }
    for (int p = 0; e < d; ++e, ++p) {
        const double t = xs * x[e] - ys * y[e];
        sums[p] += t * t;
    }
    for (int step = PARTS / 2; step > 0; step /= 2)
        for (int p = 0; p < step; ++p) sums[p] += sums[p + step];
    return sums[0];
}

}  // namespace
}  // namespace ssl_fast
