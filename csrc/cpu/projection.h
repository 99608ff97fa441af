#pragma once
// fp32 scores bounded from above by products of a few columns, those of an orthonormal basis.
//
// With Q the basis, u.v = Qu.Qv + u'.v', where u' and v' are what Q leaves out, and u'.v' is at
// most |u'| |v'| (Cauchy and Schwarz). The norms ride along as one more column. Means of many rows
// lie near the directions in which the rows differ most, so |v'| is small: with a variance that
// falls as 1 / j over 768 columns, 64 of them rule out 95% of 1000 centroids.

#include "cpu/basis.h"

namespace ssl_fast {
namespace {

#if defined(__AMX_BF16__)
// The screen's products cost less there.
constexpr bool HAS_PROJECTION = false;
#else
constexpr bool HAS_PROJECTION = true;
#endif
// |P P^t - 1| of a basis that is taken for orthonormal; up to that its error is in the bounds, and
// without its rows of zeros.
constexpr double BASIS_ERROR = 1e-3;

struct Projection {
    Basis basis;
    float* centroids;  // [panel][...] as keys of P + 1 columns
    float rounded;     // see residual_of
    float anchor_norm;
    bool serves;

    int64_t columns() const { return basis.columns; }
    int64_t depth() const { return basis.columns + 1; }
};

inline void take_projection(Arena& arena, int64_t columns, int64_t k, int64_t d, Projection& p) {
    p.serves = false;
    p.basis.columns = columns;
    if (columns == 0) return;
    take_basis(arena, columns, d, p.basis);
    p.centroids = arena.take<float>(round_up(k, FloatPath::PANEL) * p.depth());
}

// |u'|^2 with room for all roundings: with Q the orthonormal factor of P, at most |P P^t - 1| apart
// from it, and `off` bounding |fl(P u) - Q u| / |u|, so that |u'|^2 is at most
// |u|^2 - |fl(P u)|^2 + 3 off |u|^2 and u.v - fl(P u).fl(P v) - u'.v' at most (2 off + off^2) |u|
// |v|. What raises both sides' squares by a part of |u|^2 and |v|^2 raises their product by as much
// of |u| |v|. The last term stands for squares that underflow.
inline Vec residual_of(const Projection& p, Vec square, Vec projected) {
    const Vec left = max(square - projected, broadcast(0.0f));
    return fma(square, broadcast(p.rounded), left + broadcast(1e-30f));
}

// [D][LANES] -> [P + 1][LANES]. A row whose square is out of range becomes one that no bound rules
// out.
inline void project(const Projection& p, const Queries& q, float* out) {
    multiply_basis(p.basis, q.packed, out);
    const Vec limit = broadcast(HUGE_SQUARE);
    for (int v = 0; v < LANES; v += WIDTH) {
        Vec sum = broadcast(0.0f);
        for (int64_t i = 0; i < p.columns(); ++i) {
            const Vec value = load(out + i * LANES + v);
            sum = fma(value, value, sum);
        }
        const Vec square = load(q.square + v), left = residual_of(p, square, sum);
        float* last = out + p.columns() * LANES + v;
        store(last, left);
        for (int lane = 0; lane < WIDTH; ++lane)
            last[lane] = 1.000001f * __builtin_sqrtf(last[lane]);
        const Vec root = load(last);
        store(last, select_greater(limit, square, root, broadcast(__builtin_inff())));
    }
}

// What every member decides alike once the basis is packed.
inline void bound_projection(Projection& p, const Centroids& c) {
    double error = 0.0, anchor = 0.0;
    p.serves = true;
    for (int64_t i = 0; i < p.columns(); ++i) {
        error = p.basis.error[i] > error ? p.basis.error[i] : error;
        p.serves = p.serves && p.basis.error[i] < BASIS_ERROR;
    }
    if (c.anchored) anchor = wide_dot(c.anchor, c.anchor, c.d);
    p.anchor_norm = 1.00001f * __builtin_sqrtf(static_cast<float>(anchor));
    const auto d = static_cast<float>(c.d), columns = static_cast<float>(p.columns());
    const float off =
        6.1e-8f * (d + 2.0f) * __builtin_sqrtf(columns) + 1.01f * static_cast<float>(error);
    // Both chains of P multiply-adds and the squares' own roundings are in the second term.
    p.rounded = 5.0f * off + off * off + 6.1e-8f * (d + 4.0f * columns + 16.0f);
}

// Centroids [first, first + LANES) as keys of P + 1 columns. `out` is [P + 1][LANES], `values`
// holds P + 1 floats.
inline void project_centroids(const Projection& p, const Centroids& c, Dtype dtype, int64_t first,
                              float* staged, Queries& q, float* out, float* values) {
    const int count = static_cast<int>(smaller(LANES, c.k - first));
    pack_queries<FloatPath>(c.rows, dtype, c.given, {first, nullptr, count}, c, staged, q);
    project(p, q, out);
    for (int lane = 0; lane < count; ++lane) {
        for (int64_t i = 0; i < p.depth(); ++i) values[i] = out[i * LANES + lane];
        FloatPath::pack_key(values, 1.0f, first + lane, p.depth(), p.centroids);
    }
}

}  // namespace
}  // namespace ssl_fast
