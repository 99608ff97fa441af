#pragma once
// fp32 scores bounded from above by products in bfloat16, which run at twice the rate.
//
// With u' and v' the rounded rows, |u.v - u'.v'| <= |u - u'| |v| + |u'| |v - v'| (Cauchy and
// Schwarz), so u'.v' plus that much is never below the true score. The three highest such bounds
// of a row, two of them with their centroids, decide it nearly always: on Gaussian noise of 64 to
// 768 columns 70 to 95% of the rows have one candidate, and 93 to 99.9% at most two, which are
// compared in full. The labels are those of exact arithmetic, as without a screen.

#include "cpu/queries.h"

namespace ssl_fast {
namespace {

#if !defined(__AVX512BF16__)
inline bool screens(int64_t, int64_t) { return false; }
#else
// Fewer centroids don't repay the rounding of the rows; narrower rows are mostly padding.
constexpr int64_t SCREEN_CENTROIDS = 32, SCREEN_COLUMNS = 48;
// |u - u'| / |u| of usual rows; of others the bound grows in proportion.
constexpr float SCREEN_RATIO = 1.7e-3f;
// The lowest bits of a bound make room for its row in the panel.
constexpr int32_t SCREEN_BITS = Bf16Path::PANEL - 1;
static_assert((Bf16Path::PANEL & SCREEN_BITS) == 0, "a power of two");
constexpr float SCREEN_TRUNCATED = 5e-6f;  // a little more than PANEL / 2^23

inline bool screens(int64_t k, int64_t d) { return k >= SCREEN_CENTROIDS && d >= SCREEN_COLUMNS; }

inline Vec as_vec(__m512i bits) { return _mm512_castsi512_ps(bits); }

// The three highest bounds of each lane, with the first two's centroids as bits.
struct Screened {
    float* packed;                    // [depth][LANES] pairs
    alignas(64) float square[LANES];  // |u|^2
    alignas(64) float reach[LANES];   // bound = product - raised + reach_i reach_k
    alignas(64) float best[3][LANES];
    alignas(64) float index[2][LANES];

    void reset() {
        for (int v = 0; v < LANES; v += WIDTH) {
            for (float* b : best) store(b + v, broadcast(-__builtin_inff()));
            for (float* i : index) store(i + v, broadcast(0.0f));
        }
    }
};

// What a root of a sum of `columns` squares can fall short by.
inline float sum_slack(int64_t columns) { return 1.001f + 6e-8f * static_cast<float>(columns); }

// Rounds `columns` values, which are padded with zeros to `padded`, and returns the squared error.
inline float round_row(const float* values, int64_t columns, int64_t padded, uint16_t* out) {
    Vec error = broadcast(0.0f);
    int64_t e = 0;
    alignas(64) float last[WIDTH];
    for (; e < padded; e += WIDTH) {
        const float* from = values + e;
        if (e + WIDTH > columns) {
            const int64_t left = larger(0, columns - e);
            __builtin_memset(last, 0, sizeof last);
            __builtin_memcpy(last, from, left * sizeof(float));
            from = last;
        }
        const Vec exact = load(from);
        const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(exact));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + e), bits);
        const Vec rounded = as_vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        error = fma(exact - rounded, exact - rounded, error);
    }
    return sum_lanes(error);
}

// Centroids [panel * PANEL, + PANEL) for the screen. `buffer` and `values` hold round_up(d, 64)
// floats each.
inline void pack_screen_panel(Centroids& c, Dtype dtype, int64_t panel, float* buffer,
                              float* values) {
    const int64_t first = panel * Bf16Path::PANEL, padded = round_up(c.d, 32);
    auto* out = reinterpret_cast<uint16_t*>(c.rounded + panel * panel_floats<Bf16Path>(c.d));
    auto* bits = reinterpret_cast<uint16_t*>(buffer);
    const float chain = 6.1e-8f * static_cast<float>(padded + 16) + SCREEN_TRUNCATED;
    const float slack = sum_slack(c.d), tiny = 1e-37f * static_cast<float>(c.d);
    for (int64_t r = 0; r < Bf16Path::PANEL; ++r) {
        const int64_t k = first + r;
        if (k >= c.k) {
            __builtin_memset(bits, 0, padded * 2);
        } else {
            centroid_values(c, dtype, k, buffer, values);
            const float error = slack * __builtin_sqrtf(round_row(values, c.d, padded, bits));
            const float half = c.half[k], norm = __builtin_sqrtf(2.0f * half) * 1.0001f;
            const bool finite = half - half == 0.0f;
            c.reach[k] = finite ? (SCREEN_RATIO + chain) * norm + error + tiny : 0.0f;
            c.slack[k] = finite ? SCREEN_TRUNCATED * 2.0f * half + tiny * (1.0f + norm) : 0.0f;
            c.raised[k] = half - c.slack[k];
        }
        for (int64_t e = 0; e < padded; e += 32)
            __builtin_memcpy(out + e * Bf16Path::PANEL + r * 32, bits + e, 64);
    }
}

// Packs the screen of centroids that are packed already, by all members of a team; ends with a
// barrier.
inline void pack_screen(Centroids& c, Dtype dtype, Team* team, float* buffer, float* values) {
    for (int64_t panel = team->rank; panel < ceil_div(c.k, Bf16Path::PANEL); panel += team->size)
        pack_screen_panel(c, dtype, panel, buffer, values);
    team_barrier(team);
}

// Columns [d][LANES], scaled and anchored, as pairs of bfloat16; norms, and how far the bounds
// reach.
template <bool PLAIN>
void round_queries(const Centroids& c, const float* wide, const float* scale, Screened& block) {
    const __m512i pairs =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high_half = _mm512_set1_epi32(-65536);
    Vec error[VECTORS], square[VECTORS];
    for (int v = 0; v < VECTORS; ++v) error[v] = square[v] = broadcast(0.0f);
    const auto value = [&](int64_t e, int v) {
        if (e >= c.d) return broadcast(0.0f);
        const Vec given = load(wide + e * LANES + v);
        return PLAIN ? given
                     : fma(given, load(scale + v), broadcast(c.anchored ? -c.anchor[e] : 0.0f));
    };
    const int64_t depth = Bf16Path::depth(c.d);
    for (int64_t p = 0; p < depth; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const Vec low = value(2 * p, v * WIDTH), high = value(2 * p + 1, v * WIDTH);
            const __m512i both = _mm512_permutexvar_epi16(
                pairs, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
            _mm512_storeu_si512(block.packed + p * LANES + v * WIDTH, both);
            const Vec low_error = low - as_vec(_mm512_slli_epi32(both, 16));
            const Vec high_error = high - as_vec(_mm512_and_si512(both, high_half));
            error[v] = fma(low_error, low_error, error[v]);
            error[v] = fma(high_error, high_error, error[v]);
            square[v] = fma(low, low, square[v]);
            square[v] = fma(high, high, square[v]);
        }
    }
    const Vec slack = broadcast(sum_slack(c.d));
    for (int v = 0; v < VECTORS; ++v) {
        const Vec lost = _mm512_sqrt_ps(error[v]) * slack;
        store(block.square + v * WIDTH, square[v]);
        store(block.reach + v * WIDTH, max(lost * broadcast(1.0f / SCREEN_RATIO),
                                           fma(_mm512_sqrt_ps(square[v]), slack, lost)));
    }
}

// The score of a lane's candidate is at least its bound less twice the bound's reach.
inline Vec least_scores(const Centroids& c, const Screened& block, int candidate, int v) {
    const Vec bound = load(block.best[candidate] + v);
    const __m512i k = _mm512_castps_si512(load(block.index[candidate] + v));
    const Vec reach = fma(load(block.reach + v), _mm512_i32gather_ps(k, c.reach, 4),
                          _mm512_i32gather_ps(k, c.slack, 4));
    return fma(reach, broadcast(-2.0001f), bound - _mm512_abs_ps(bound) * broadcast(2.4e-7f));
}

// A bound and its centroid into a lane's three highest.
inline void insert_bound(Vec bound, Vec index, Vec (&best)[3], Vec (&held)[2]) {
    held[1] =
        select_greater(bound, best[0], held[0], select_greater(bound, best[1], index, held[1]));
    held[0] = select_greater(bound, best[0], index, held[0]);
    best[2] = max(min(best[1], bound), best[2]);
    best[1] = max(min(best[0], bound), best[1]);
    best[0] = max(bound, best[0]);
}

// The products [rows][LANES] of a panel.
inline void screen_products(const Centroids& c, int64_t panel, int rows, const float* queries,
                            float* out) {
    bf16_panel(c.rounded + panel * panel_floats<Bf16Path>(c.d), rows, c.d, queries, out);
}

// One panel's products [rows][LANES], of centroids k, k + 1, ..., into the highest bounds.
inline void screen_panel(const Centroids& c, int64_t k, int rows, const float* tile,
                         Screened& block) {
    alignas(64) static constexpr int32_t ROW[Bf16Path::PANEL] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
        16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const __m512i low = _mm512_set1_epi32(SCREEN_BITS);
    Vec top[VECTORS][3], reach[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
        reach[v] = load(block.reach + v * WIDTH);
        for (Vec& t : top[v]) t = broadcast(-__builtin_inff());
    }
    for (int r = 0; r < rows; ++r) {
        const Vec far = broadcast(c.reach[k + r]), raised = broadcast(c.raised[k + r]);
        const __m512i row = _mm512_set1_epi32(ROW[r]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const Vec b = fma(reach[v], far, load(tile + r * LANES + v * WIDTH) - raised);
            // (b & ~low) | row. A NaN stays one and is passed over.
            const Vec s = as_vec(_mm512_ternarylogic_epi32(_mm512_castps_si512(b), low, row, 0xba));
            top[v][2] = max(min(top[v][1], s), top[v][2]);
            top[v][1] = max(min(top[v][0], s), top[v][1]);
            top[v][0] = max(s, top[v][0]);
        }
    }
    const __m512i first = _mm512_set1_epi32(static_cast<int32_t>(k));
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
        const int at = v * WIDTH;
        Vec best[3] = {load(block.best[0] + at), load(block.best[1] + at),
                       load(block.best[2] + at)};
        if (!any_greater(top[v][0], best[2])) continue;
        Vec held[2] = {load(block.index[0] + at), load(block.index[1] + at)};
        for (const Vec& t : top[v]) {
            const __m512i row = _mm512_and_si512(_mm512_castps_si512(t), low);
            insert_bound(t, as_vec(_mm512_add_epi32(row, first)), best, held);
        }
        for (int j = 0; j < 3; ++j) store(block.best[j] + at, best[j]);
        for (int j = 0; j < 2; ++j) store(block.index[j] + at, held[j]);
    }
}

#endif

}  // namespace
}  // namespace ssl_fast
