#pragma once
// The centroids of one problem as the sweeps of nearest and top_k read them.
//
// A score is u.v - 1/2 |v|^2, the largest of which is the nearest. Far from the origin its terms
// cancel, so an anchor is subtracted from both sides there: the mean of the centroids, which
// leaves the argmax as it is.

#include "core/clustering.h"
#include "cpu/layout.h"

namespace ssl_fast {
namespace {

// |mean|^2 against the mean of |v - mean|^2, above which the anchor is subtracted. A bfloat16
// product takes bfloat16 operands, so there the anchor costs half of the speed, and is needed only
// where many rows would be scored a second time.
constexpr double FAR_FP32 = 4.0, FAR_BF16 = 32.0;
// Columns between two terms of a prefix sum.
constexpr int64_t PREFIX = 16;

#if defined(__AVX512BF16__)
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif

inline Rows matrix(const Batch& batch, Dtype dtype, int64_t b) {
    return {static_cast<const char*>(batch.data) + b * batch.batch_stride * element_size(dtype),
            batch.row_stride};
}

struct Centroids {
    int64_t k, d;
    Rows rows;           // [K, D], as given
    const float* given;  // [K] their scales, or null
    bool bf16, anchored;
    float* packed;      // [panel][...], by the path
    float* half;        // [K] 1/2 |v|^2
    float* scale;       // [K] of bfloat16 products
    float* index;       // [K] the bits of k
    float* anchor;      // [D]
    double* column;     // [D] sums of a column
    double* squares;    // [D]
    float* panel_norm;  // [panel] largest |v|^2, and
    float* panel_prefix;
    float* rounded;      // [panel][...] of the screen, or null
    float* reach;        // [K] by which a bound of it exceeds the product, for |u| = 1
    float* slack;        // [K] what the roundings of 1/2 |v|^2 amount to
    float* raised;       // [K] 1/2 |v|^2 less the slack
    float norm, prefix;  // of all: what the error of a score is bounded with

    float scale_of(int64_t j) const { return given == nullptr ? 1.0f : given[j]; }
};

template <class Path>
constexpr int64_t panel_floats(int64_t d) {
    return Path::PANEL * (Path::BF16 ? round_up(d, 32) / 2 : d);
}

constexpr int64_t MIN_PANEL = FloatPath::PANEL;

inline void take_centroids(Arena& arena, int64_t k, int64_t d, Centroids& c,
                           bool screened = false) {
    const int64_t panels = ceil_div(k, MIN_PANEL), rows = round_up(k, MIN_PANEL * 4);
    c.k = k;
    c.d = d;
    // A row of either path; bfloat16's columns are padded to 32.
    c.packed = arena.take<float>(rows * larger(d, round_up(d, 32) / 2));
    c.half = arena.take<float>(rows);
    c.scale = arena.take<float>(rows);
    c.index = arena.take<float>(rows);
    c.anchor = arena.take<float>(d);
    c.column = arena.take<double>(d);
    c.squares = arena.take<double>(d);
    c.panel_norm = arena.take<float>(panels);
    c.panel_prefix = arena.take<float>(panels);
    c.rounded = screened ? arena.take<float>(rows * round_up(d, 32) / 2) : nullptr;
    c.reach = arena.take<float>(screened ? rows : 0);
    c.slack = arena.take<float>(screened ? rows : 0);
    c.raised = arena.take<float>(screened ? rows : 0);
}

// Sums over the centroids of the columns that this member of a team takes. What is not finite is
// left out: such a centroid is nobody's nearest.
inline void sum_columns(Centroids& c, Dtype dtype, const Team& team, float* buffer) {
    constexpr int64_t SLICE = 64;
    for (int64_t e = team.rank * SLICE; e < c.d; e += team.size * SLICE) {
        const int64_t width = smaller(SLICE, c.d - e);
        double sum[SLICE] = {}, square[SLICE] = {};
        const Rows from{static_cast<const char*>(c.rows.data) + e * element_size(dtype),
                        c.rows.stride};
        for (int64_t k = 0; k < c.k; ++k) {
            const float* row = widen(from, dtype, k, width, buffer);
            const float scale = c.scale_of(k);
            for (int64_t x = 0; x < width; ++x) {
                const float scaled = scale * row[x];
                const double v = scaled - scaled == 0.0f ? scaled : 0.0f;
                sum[x] += v;
                square[x] += v * v;
            }
        }
        __builtin_memcpy(c.column + e, sum, width * sizeof(double));
        __builtin_memcpy(c.squares + e, square, width * sizeof(double));
    }
}

// What every member decides alike once the columns are summed.
inline void place_anchor(Centroids& c, Dtype dtype) {
    double mean_square = 0.0, total = 0.0;
    const double count = static_cast<double>(c.k);
    for (int64_t e = 0; e < c.d; ++e) {
        const double mean = c.column[e] / count;
        mean_square += mean * mean;
        total += c.squares[e];
    }
    const double spread = total / count - mean_square;
    c.bf16 = HAS_BF16 && dtype == Dtype::bfloat16 && mean_square <= FAR_BF16 * spread;
    c.anchored = !c.bf16 && mean_square > FAR_FP32 * spread && c.k > 1;
}

// |v|^2 and the sum over j of |v_1 .. v_j|^2, rounded up to whole PREFIX columns: a chain of
// multiply-adds errs by at most eps times the latter, of both sides.
struct Norms {
    double square, prefix;
};
inline Norms norms_of(const float* row, int64_t d) {
    Norms n{0.0, 0.0};
    for (int64_t e = 0; e < d; e += PREFIX) {
        double part[4] = {};
        const int64_t end = smaller(e + PREFIX, d);
        int64_t x = e;
        for (; x + 4 <= end; x += 4)
            for (int y = 0; y < 4; ++y)
                part[y] += static_cast<double>(row[x + y]) * static_cast<double>(row[x + y]);
        for (; x < end; ++x) part[0] += static_cast<double>(row[x]) * static_cast<double>(row[x]);
        n.square += (part[0] + part[1]) + (part[2] + part[3]);
        n.prefix += n.square;
    }
    n.prefix *= static_cast<double>(smaller(PREFIX, d));
    return n;
}

// The anchor's columns must be there: a barrier after write_anchor.
inline void write_anchor(Centroids& c, const Team& team) {
    for (int64_t e = team.rank; e < c.d; e += team.size)
        c.anchor[e] = static_cast<float>(c.column[e] / static_cast<double>(c.k));
}

// Centroid k scaled and, where there is one, without the anchor.
inline void centroid_values(const Centroids& c, Dtype dtype, int64_t k, float* buffer,
                            float* values) {
    const float* row = widen(c.rows, dtype, k, c.d, buffer);
    const float scale = c.scale_of(k);
    if (c.anchored) {
        for (int64_t e = 0; e < c.d; ++e)
            values[e] = static_cast<float>(static_cast<double>(scale) * row[e] - c.anchor[e]);
    } else {
        for (int64_t e = 0; e < c.d; ++e) values[e] = scale * row[e];
    }
}

// `buffer` and `values` hold round_up(d, 64) floats each.
template <class Path>
void pack_panel(Centroids& c, Dtype dtype, int64_t panel, float* buffer, float* values) {
    const int64_t first = panel * Path::PANEL, d = c.d;
    float* packed = c.packed + panel * panel_floats<Path>(d);
    float norm = 0.0f, prefix = 0.0f;
    for (int64_t r = 0; r < Path::PANEL; ++r) {
        const int64_t k = first + r;
        const bool exists = k < c.k;
        if (exists)
            centroid_values(c, dtype, k, buffer, values);
        else
            __builtin_memset(values, 0, d * sizeof(float));
        const Norms n = norms_of(values, d);
        const float half = static_cast<float>(0.5 * n.square);
        c.half[k] = half;
        c.scale[k] = exists ? c.scale_of(k) : 0.0f;
        c.index[k] = bits_to_float(static_cast<uint32_t>(k));
        // One that is not finite, or whose norm overflows, does not bound the others' errors.
        if (half - half == 0.0f) {
            norm = n.square > norm ? static_cast<float>(n.square) : norm;
            prefix = n.prefix > prefix ? static_cast<float>(n.prefix) : prefix;
        }
        if constexpr (Path::BF16) {
            const int64_t padded = round_up(d, 32);
            uint16_t* bits = reinterpret_cast<uint16_t*>(values);
            if (exists) __builtin_memcpy(bits, row_at(c.rows, dtype, k), d * 2);
            __builtin_memset(bits + (exists ? d : 0), 0, (padded - (exists ? d : 0)) * 2);
            uint16_t* out = reinterpret_cast<uint16_t*>(packed);
            for (int64_t e = 0; e < padded; e += 32)
                __builtin_memcpy(out + e * Path::PANEL + r * 32, bits + e, 64);
        } else {
            Path::pack_key(values, 1.0f, r, d, packed);
        }
    }
    // A little more than the truth, for the roundings on the way.
    c.panel_norm[panel] = norm * 1.0001f;
    c.panel_prefix[panel] = prefix * 1.0001f;
}

template <class Path>
void pack_panels(Centroids& c, Dtype dtype, const Team& team, float* buffer, float* values) {
    const int64_t panels = ceil_div(c.k, Path::PANEL);
    for (int64_t panel = team.rank; panel < panels; panel += team.size)
        pack_panel<Path>(c, dtype, panel, buffer, values);
}

// After all panels are packed.
template <class Path>
void bound_norms(Centroids& c) {
    const int64_t panels = ceil_div(c.k, Path::PANEL);
    c.norm = c.prefix = 0.0f;
    for (int64_t panel = 0; panel < panels; ++panel) {
        c.norm = c.panel_norm[panel] > c.norm ? c.panel_norm[panel] : c.norm;
        c.prefix = c.panel_prefix[panel] > c.prefix ? c.panel_prefix[panel] : c.prefix;
    }
}

inline void choose_anchor(Centroids& c, Dtype dtype, Team* team, float* buffer) {
    sum_columns(c, dtype, *team, buffer);
    team_barrier(team);
    place_anchor(c, dtype);
    if (!c.anchored) return;
    write_anchor(c, *team);
    team_barrier(team);
}

// Packs a problem's centroids, by all members of a team; ends with a barrier.
inline void pack_centroids(Centroids& c, Dtype dtype, Team* team, float* buffer, float* values) {
    choose_anchor(c, dtype, team, buffer);
#if defined(__AVX512BF16__)
    if (c.bf16) {
        pack_panels<Bf16Path>(c, dtype, *team, buffer, values);
        team_barrier(team);
        bound_norms<Bf16Path>(c);
        return;
    }
#endif
    pack_panels<FloatPath>(c, dtype, *team, buffer, values);
    team_barrier(team);
    bound_norms<FloatPath>(c);
}

#if defined(__AVX512BF16__)
// T [rows][LANES]: the products of a panel's rows with the queries.
inline void bf16_panel(const float* packed, int rows, int64_t d, const float* queries, float* out) {
#if defined(__AMX_BF16__)
    rows = Bf16Path::PANEL;
#endif
    bf16_product<16, false>({packed, Bf16Path::PANEL * 16, queries, 16 * LANES,
                             static_cast<int>(round_up(d, 32) / 32), 0},
                            16, rows, out, LANES);
}
#endif

// The same of an fp32 panel: rows of `d` columns packed as by FloatPath::pack_key.
inline void float_panel(const float* packed, int rows, int64_t d, const float* queries,
                        float* out) {
    for (int64_t k = 0; k < d; k += FloatPath::DEPTH) {
        const int steps = static_cast<int>(smaller(FloatPath::DEPTH, d - k));
        for (int r = 0; r < rows; r += FloatPath::PACK) {
            const int height = rows - r < FloatPath::PACK ? rows - r : FloatPath::PACK;
            const Operands o{packed + r * d + k * FloatPath::PACK,
                             0,
                             queries + k * LANES,
                             0,
                             1,
                             FloatPath::PACK * d};
            if (k == 0)
                tile_of<FloatStep, 1, FloatPath::PACK, FloatPath::PACK, false>(
                    o, steps, height, out + r * LANES, LANES);
            else
                tile_of<FloatStep, 1, FloatPath::PACK, FloatPath::PACK, true>(
                    o, steps, height, out + r * LANES, LANES);
        }
    }
}

// T [rows][LANES] of one panel: u.v, without the scales in bfloat16.
template <class Path>
void panel_products(const Centroids& c, int64_t panel, int rows, const float* queries, float* out) {
    const float* packed = c.packed + panel * panel_floats<Path>(c.d);
    if constexpr (Path::BF16) {
#if defined(__AVX512BF16__)
        bf16_panel(packed, rows, c.d, queries, out);
#endif
    } else {
        float_panel(packed, rows, c.d, queries, out);
    }
}

}  // namespace
}  // namespace ssl_fast
