#pragma once
// The epilogue: from a group's logits [rows][LANES] to exponentials or weights, in place.
// Logits are in units of log 2, so that one exp2 serves.

#include "cpu/products.h"

namespace ssl_fast {
namespace {

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LOG2E_REST = 1.92596303e-8f;  // log2(e) - LOG2E
constexpr float LN2 = 0.69314718055994530942f;
constexpr float LARGEST = 3.402823466e38f;

// Rows' running maximum, and the sum of their exponentials relative to a reference. The reference
// follows the maximum only when that has run SLACK ahead: what was accumulated hardly ever has to
// be rescaled, and the exponentials of all groups of keys share one factor. It never leaves the
// finite range, so that -inf and +inf logits give 0 and +inf instead of NaN.
struct Statistics {
    float* maximum;
    float* reference;
    float* sum;

    Statistics at(int64_t row) const { return {maximum + row, reference + row, sum + row}; }
    void reset(int64_t rows) const {
        for (int64_t row = 0; row < rows; ++row) {
            maximum[row] = -__builtin_inff();
            reference[row] = -LARGEST;
            sum[row] = 0.0f;
        }
    }
};

// In powers of 2. 2^32 times 2^31 keys stays far below overflow, and a weight of 2^-94 relative to
// the maximum far above underflow.
constexpr float SLACK = 32.0f;

// One group of keys against one sub-block of queries.
struct Block {
    int64_t query, key;  // the first of each
    int queries, keys;   // that exist
    int rows;            // keys, padded to whole panels
};

inline void exclude_row(float* row) {
    for (int v = 0; v < LANES; v += WIDTH) store(row + v, broadcast(-__builtin_inff()));
}

// The pairs of a block that leave for their ids. The queries' first ids are at `lane_ids`, padded
// to LANES, their second ones at distance `stride`.
inline void exclude_ids(const Exclusion& rule, const int64_t* lane_ids, int64_t stride,
                        const Block& block, float* logits) {
    const Vec excluded = broadcast(-__builtin_inff());
    for (int row = 0; row < block.keys; ++row) {
        bool ignored = false;
        for (int id = 0; id < rule.n_ids; ++id)
            ignored |= rule.key_ids[id][block.key + row] == IGNORED_ID;
        if (ignored) {
            exclude_row(logits + row * LANES);
            continue;
        }
        for (int v = 0; v < LANES; v += WIDTH) {
            float* p = logits + row * LANES + v;
            const Vec logit = load(p), common = rule.matching ? logit : excluded;
            Vec kept = rule.matching ? excluded : logit;
            for (int id = 0; id < rule.n_ids; ++id)
                kept = select_equal(lane_ids + id * stride + v, rule.key_ids[id][block.key + row],
                                    common, kept);
            store(p, kept);
        }
    }
    for (int id = 0; id < rule.n_ids; ++id)
        for (int lane = 0; lane < block.queries; ++lane) {
            if (lane_ids[id * stride + lane] != IGNORED_ID) continue;
            for (int row = 0; row < block.keys; ++row)
                logits[row * LANES + lane] = -__builtin_inff();
        }
}

// `lane_ids` and `stride` as for exclude_ids.
inline void exclude(const Exclusion& rule, const int64_t* lane_ids, int64_t stride,
                    const Block& block, float* logits) {
    for (int rows = block.keys; rows < block.rows; ++rows) exclude_row(logits + rows * LANES);
    for (int k = 0; k < rule.n_diagonals; ++k) {
        const int64_t first = block.query + rule.diagonals[k] - block.key;
        const int64_t begin = larger(0, -first), end = smaller(block.queries, block.keys - first);
        for (int64_t lane = begin; lane < end; ++lane)
            logits[(first + lane) * LANES + lane] = -__builtin_inff();
    }
    if (rule.n_ids > 0) exclude_ids(rule, lane_ids, stride, block, logits);
}

// Calls use(lane, logit) for the pairs of a block on the first diagonal.
template <class Use>
void on_diagonal(const Exclusion& rule, const Block& block, float* logits, Use use) {
    if (rule.n_diagonals == 0) return;
    const int64_t first = block.query + rule.diagonals[0] - block.key;
    const int64_t begin = larger(0, -first), end = smaller(block.queries, block.keys - first);
    for (int64_t lane = begin; lane < end; ++lane) use(lane, logits[(first + lane) * LANES + lane]);
}

// bfloat16 products come unscaled.
inline void scale_logits(const float* lane_scale, const float* key_scale, int rows, float* logits) {
    Vec scale[VECTORS];
    for (int v = 0; v < VECTORS; ++v) scale[v] = load(lane_scale + v * WIDTH);
    for (int row = 0; row < rows; ++row) {
        const Vec key = broadcast(key_scale[row]);
        for (int v = 0; v < VECTORS; ++v) {
            float* p = logits + row * LANES + v * WIDTH;
            store(p, load(p) * (scale[v] * key));
        }
    }
}

// One panel of logits into the statistics. Returns whether the reference moved; `correction` is
// then the factor for all that was accumulated relative to the old one. With STORE the logits
// become exponentials.
template <bool STORE>
bool online_softmax(float* logits, int rows, const Statistics& statistics, float* correction) {
    Vec maximum[VECTORS], reference[VECTORS], sum[VECTORS];
    bool moved = false;
    for (int v = 0; v < VECTORS; ++v) {
        maximum[v] = load(statistics.maximum + v * WIDTH);
        reference[v] = load(statistics.reference + v * WIDTH);
    }
    for (int row = 0; row < rows; ++row)
        for (int v = 0; v < VECTORS; ++v)
            maximum[v] = max(load(logits + row * LANES + v * WIDTH), maximum[v]);
    for (int v = 0; v < VECTORS; ++v) {
        store(statistics.maximum + v * WIDTH, maximum[v]);
        moved |= any_greater(maximum[v], reference[v] + broadcast(SLACK));
    }
    if (moved)
        for (int v = 0; v < LANES; v += WIDTH) {
            const Vec old = reference[v / WIDTH];
            const Vec now = min(max(maximum[v / WIDTH], old), broadcast(LARGEST));
            const Vec factor = exp2(old - now);
            store(correction + v, factor);
            store(statistics.sum + v, load(statistics.sum + v) * factor);
            store(statistics.reference + v, now);
            reference[v / WIDTH] = now;
        }
    for (int v = 0; v < VECTORS; ++v) sum[v] = broadcast(0.0f);
    for (int row = 0; row < rows; ++row)
        for (int v = 0; v < VECTORS; ++v) {
            float* p = logits + row * LANES + v * WIDTH;
            const Vec e = exp2(load(p) - reference[v]);
            sum[v] = sum[v] + e;
            if (STORE) store(p, e);
        }
    for (int v = 0; v < VECTORS; ++v) {
        float* p = statistics.sum + v * WIDTH;
        store(p, load(p) + sum[v]);
    }
    return moved;
}

// The same for the keys: one maximum and sum per row of the panel, over its lanes.
inline void column_softmax(const float* logits, int rows, const Statistics& statistics) {
    for (int row = 0; row < rows; ++row) {
        Vec lanes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) lanes[v] = load(logits + row * LANES + v * WIDTH);
        Vec highest = broadcast(statistics.maximum[row]);
        for (int v = 0; v < VECTORS; ++v) highest = max(lanes[v], highest);
        const float maximum = max_lanes(highest);
        float reference = statistics.reference[row];
        if (maximum > reference + SLACK) {
            const float now = maximum > LARGEST ? LARGEST : maximum;
            statistics.sum[row] *= __builtin_exp2f(reference - now);
            reference = now;
        }
        Vec sum = broadcast(0.0f);
        for (int v = 0; v < VECTORS; ++v) sum = sum + exp2(lanes[v] - broadcast(reference));
        statistics.maximum[row] = maximum;
        statistics.reference[row] = reference;
        statistics.sum[row] += sum_lanes(sum);
    }
}

// What one sub-block of queries gives to the statistics of a panel's keys: a finite reference and
// the sum of exponentials relative to it. The queries past the last one are at -inf.
inline void column_part(const float* logits, int rows, float* reference, float* sum) {
    for (int row = 0; row < rows; ++row) {
        Vec lanes[VECTORS];
        Vec highest = broadcast(-LARGEST);
        for (int v = 0; v < VECTORS; ++v) lanes[v] = load(logits + row * LANES + v * WIDTH);
        for (int v = 0; v < VECTORS; ++v) highest = max(lanes[v], highest);
        const float maximum = max_lanes(highest);
        reference[row] = maximum > LARGEST ? LARGEST : maximum;
        const Vec shift = broadcast(reference[row]);
        Vec total = broadcast(0.0f);
        for (int v = 0; v < VECTORS; ++v) total = total + exp2(lanes[v] - shift);
        sum[row] = sum_lanes(total);
    }
}

// A part into the statistics of `count` keys, a multiple of WIDTH.
inline void merge_columns(const float* part_reference, const float* part_sum, int64_t count,
                          float* reference, float* sum) {
    for (int64_t j = 0; j < count; j += WIDTH) {
        const Vec old = load(reference + j), part = load(part_reference + j);
        const Vec now = max(part, old);
        store(reference + j, now);
        store(sum + j, fma(load(sum + j), exp2(old - now), load(part_sum + j) * exp2(part - now)));
    }
}

// sum [rows][LANES] *= factor [LANES]
inline void rescale(const float* factor, int64_t rows, float* sum) {
    for (int v = 0; v < LANES; v += WIDTH) {
        const Vec f = load(factor + v);
        for (int64_t row = 0; row < rows; ++row) {
            float* p = sum + row * LANES + v;
            store(p, load(p) * f);
        }
    }
}

// A given log-sum-exp, in nats, and its gradient, as the weights take them: in units of log 2,
// where what the change of units rounds away goes into the gradient. At 200 nats it would be 2e-5
// of every weight. An empty row has no weights.
struct GivenRow {
    float lse, grad;
};

inline GivenRow given_row(float lse, float grad) {
    if (lse == -__builtin_inff()) return {0.0f, 0.0f};
    const float rounded = lse * LOG2E;
    const float rest = __builtin_fmaf(lse, LOG2E, -rounded) + lse * LOG2E_REST;
    // An infinite lse has no rest.
    return {rounded, rest == rest ? grad - grad * (rest * LN2) : grad};
}

// What the backward pass knows of its rows and columns, in units of log 2.
struct GivenWeights {
    const float* row_lse;      // [LANES]
    const float* row_grad;     // [LANES]
    const float* column_lse;   // [rows] or null
    const float* column_grad;  // [rows]
};

inline void given_weights(float* logits, int rows, const GivenWeights& given) {
    for (int v = 0; v < LANES; v += WIDTH) {
        const Vec row_lse = load(given.row_lse + v), row_grad = load(given.row_grad + v);
        for (int row = 0; row < rows; ++row) {
            float* p = logits + row * LANES + v;
            const Vec logit = load(p);
            Vec weight = row_grad * exp2(logit - row_lse);
            if (given.column_lse != nullptr)
                weight = fma(broadcast(given.column_grad[row]),
                             exp2(logit - broadcast(given.column_lse[row])), weight);
            store(p, weight);
        }
    }
}

// For the lanes past the last query, which would carry NaN into a sum over queries where a key is
// not finite.
inline void fill_lanes(float* block, int rows, int first, float value) {
    for (int row = 0; row < rows; ++row)
        for (int lane = first; lane < LANES; ++lane) block[row * LANES + lane] = value;
}

#if defined(__AVX512BF16__)
// fp32 weights -> bfloat16 twice: [rows][LANES] for the query sum, and pairs of rows, times the
// keys' scales, for the key sum. Either may be null.
inline void round_weights(const float* weights, int rows, const float* key_scale, uint16_t* strip,
                          float* pairs) {
    for (int row = 0; row < rows; row += 2) {
        const Vec even_scale = broadcast(key_scale[row]), odd_scale = broadcast(key_scale[row + 1]);
        for (int v = 0; v < LANES; v += WIDTH) {
            const Vec even = load(weights + row * LANES + v);
            const Vec odd = load(weights + (row + 1) * LANES + v);
            if (strip != nullptr) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(strip + row * LANES + v),
                                    reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(strip + (row + 1) * LANES + v),
                                    reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
            }
            if (pairs != nullptr)
                _mm512_storeu_si512(pairs + row / 2 * LANES + v,
                                    interleave(_mm512_cvtneps_pbh(even * even_scale),
                                               _mm512_cvtneps_pbh(odd * odd_scale)));
        }
    }
}
#endif

}  // namespace
}  // namespace ssl_fast
