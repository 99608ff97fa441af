#pragma once
// An orthonormal basis of the directions in which centroids reach farthest.
//
// One step of subspace iteration from some of the centroids themselves: Y = (S V^t) V, whose rows
// are then made orthonormal. Over ten passes of lloyd whose rows had variances of 1 / j or
// 1 / j^(8/5), a second step gained nothing on average. [AMD EPYC, Zen 3, 2026-11-27]

#include "cpu/queries.h"

namespace ssl_fast {
namespace {

struct Basis {
    int64_t columns, d;
    float* packed;  // [panel][...] keys of D columns
    float* rows;    // [P][padded]
    double* error;  // [P] sums of a row of |P P^t - 1|

    int64_t padded() const { return round_up(d, LANES); }
    float* row(int64_t i) const { return rows + i * padded(); }
};

inline void take_basis(Arena& arena, int64_t columns, int64_t d, Basis& b) {
    b.columns = columns;
    b.d = d;
    b.packed = arena.take<float>(round_up(columns, FloatPath::PANEL) * d);
    b.rows = arena.take<float>(columns * b.padded());
    b.error = arena.take<double>(columns);
}

inline double wide_dot(const float* x, const float* y, int64_t d) {
    double parts[8] = {};
    int64_t e = 0;
    for (; e + 8 <= d; e += 8)
        for (int j = 0; j < 8; ++j) parts[j] += static_cast<double>(x[e + j]) * y[e + j];
    for (int j = 0; e < d; ++e, ++j) parts[j] += static_cast<double>(x[e]) * y[e];
    return ((parts[0] + parts[1]) + (parts[2] + parts[3])) +
           ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

// out [P][LANES] = the basis times the queries.
inline void multiply_basis(const Basis& b, const float* queries, float* out) {
    for (int64_t i = 0; i < b.columns; i += FloatPath::PANEL)
        float_panel(b.packed + i * b.d, static_cast<int>(smaller(FloatPath::PANEL, b.columns - i)),
                    b.d, queries, out + i * LANES);
}

// Every (K / P)th centroid, packed: where the iteration starts. A barrier must follow.
inline void pack_start(const Basis& b, const Centroids& c, Dtype dtype, const Team& team,
                       float* buffer, float* values) {
    for (int64_t i = team.rank; i < b.columns; i += team.size) {
        centroid_values(c, dtype, i * (c.k / b.columns), buffer, values);
        FloatPath::pack_key(values, 1.0f, i, b.d, b.packed);
    }
}

// sums [P][padded] += (S V^t) V of LANES centroids whose columns are packed [D][LANES]. `products`
// is [P][LANES], `block` [LANES][LANES].
inline void add_step(const Basis& b, const float* packed, float* products, float* block,
                     float* sums) {
    multiply_basis(b, packed, products);
    for (int64_t e = 0; e < b.d; e += LANES) {
        const int64_t width = smaller(LANES, b.d - e);
        if (width == LANES) {
            transpose_rows(packed + e * LANES, LANES, LANES, block);
        } else {
            __builtin_memset(block, 0, LANES * LANES * sizeof(float));
            for (int64_t x = 0; x < width; ++x)
                for (int lane = 0; lane < LANES; ++lane)
                    block[lane * LANES + x] = packed[(e + x) * LANES + lane];
        }
        const Operands o{products, 0, block, 0, 1, 0};
        product<FloatStep, LANES, 1, 0, true>(o, LANES, static_cast<int>(b.columns), sums + e,
                                              b.padded());
    }
}

// Rows from `i` on need not be orthonormal yet. One that the others span becomes zeros.
inline void orthonormalize(const Basis& b, int64_t i) {
    float* row = b.row(i);
    double before = wide_dot(row, row, b.d), after = before;
    // What cancels is made up for by going over it again.
    for (int pass = 0; pass < 3; ++pass) {
        for (int64_t j = 0; j < i; ++j) {
            const float* other = b.row(j);
            const auto part = static_cast<float>(wide_dot(row, other, b.d));
            for (int64_t e = 0; e < b.d; ++e) row[e] -= part * other[e];
        }
        before = after;
        after = wide_dot(row, row, b.d);
        if (after > 0.5 * before) break;
    }
    // Also where the squares leave the range, or one is NaN.
    const bool some = after > 0.25 * before && after > 1e-30 && after < 1e36;
    const float scale = some ? static_cast<float>(1.0 / __builtin_sqrt(after)) : 0.0f;
    for (int64_t e = 0; e < b.d; ++e) row[e] = some ? row[e] * scale : 0.0f;
}

// Packs row i and holds it against the others.
inline void pack_row(const Basis& b, int64_t i) {
    const float* row = b.row(i);
    FloatPath::pack_key(row, 1.0f, i, b.d, b.packed);
    double error = 0.0;
    for (int64_t j = 0; j < b.columns; ++j) {
        const double product = wide_dot(row, b.row(j), b.d);
        error += __builtin_fabs(i == j && product != 0.0 ? product - 1.0 : product);
    }
    b.error[i] = error;
}

}  // namespace
}  // namespace ssl_fast
