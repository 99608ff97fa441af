#pragma once
// The nearest centroids of rows by way of the projection.
//
// The centroid that was a row's nearest before gives a distance, which any other that comes nearer
// must score above. The few whose bounds do are measured in full.

#include "cpu/exact_rows.h"
#include "cpu/projection.h"

namespace ssl_fast {
namespace {

class PrunedRows {
  public:
    PrunedRows(const Nearest& call, ExactRows& exact)
        : c_(call), exact_(exact), serves_(prunes(call)) {
        const auto k = static_cast<float>(c_.k), d = static_cast<float>(c_.d);
        const auto columns = static_cast<float>(c_.columns);
        share_ = (WORTH - columns / k - columns / d) / (PAIR_COLUMN + PAIR / d);
    }

    static bool prunes(const Nearest& call) {
        return HAS_PROJECTION && call.previous != nullptr && call.dtype == Dtype::float32;
    }

    void take(Arena& arena, int64_t unit) {
        if (!serves_) return;
        for (int64_t s = 0; s < unit; ++s) {
            block_[s] = arena.take<Block>(1);
            projected_[s] = arena.take<float>((c_.columns + 1) * LANES);
        }
        values_ = arena.take<float>(c_.columns + 1);
        tile_ = arena.take<float>(LANES * LANES);
        sums_ = arena.take<float>(c_.columns * round_up(c_.d, LANES));
    }
    void begin() { trial_.begin(); }

    // Packs a problem's projection, by all members of a team; ends with a barrier.
    void pack(Projection& p, const Centroids& c, Team* team, float* packed, float* buffer,
              float* values) {
        make_basis(p.basis, c, team, packed, buffer, values);
        bound_projection(p, c);
        if (!p.serves) return;
        Queries& queries = block_[0]->queries;
        for (int64_t k = team->rank * LANES; k < c.k; k += team->size * LANES)
            project_centroids(p, c, c_.dtype, k, exact_.staged, queries, projected_[0], values_);
        team_barrier(team);
    }

    // How many of the next `rows` rows are tried.
    int64_t share(const Problem& p, int64_t rows) {
        return serves_ && p.projection->serves ? trial_.share(rows) : 0;
    }

    // As NearestRows::assign, with packed rows in `packed`; false where too little is ruled out,
    // which leaves the rows as they are.
    bool assign(const Problem& p, const Centroids& c, int64_t first, int64_t end, Ahead ahead,
                float* const* packed) {
        const Projection& projection = *p.projection;
        const int64_t blocks = ceil_div(end - first, LANES), depth = projection.depth();
        left_ = static_cast<int64_t>(share_ * static_cast<float>((end - first) * c.k));
        for (int64_t s = 0; s < blocks; ++s) {
            const int64_t row = first + s * LANES;
            Block& block = *block_[s];
            block.queries.packed = packed[s];
            const auto count = static_cast<int>(smaller(LANES, end - row));
            pack_queries<FloatPath>(p.x, c_.dtype, p.x_scale, {row, nullptr, count}, c,
                                    exact_.staged, block.queries);
            project(projection, block.queries, projected_[s]);
            measure_previous(p, c, row, count, block);
        }
        const int64_t panels = ceil_div(c.k, FloatPath::PANEL);
        const int64_t group = larger(1, GROUP_BYTES / 4 / (FloatPath::PANEL * depth));
        const int64_t lines = ceil_div(ahead.lines(), panels * blocks);
        for (int64_t g = 0; g < panels; g += group)
            for (int64_t s = 0; s < blocks; ++s) {
                for (int64_t panel = g; panel < smaller(g + group, panels); ++panel) {
                    const int64_t k = panel * FloatPath::PANEL;
                    const int rows = static_cast<int>(smaller(FloatPath::PANEL, c.k - k));
                    ahead.fetch(lines);
                    float_panel(projection.centroids + k * depth, rows, depth, projected_[s],
                                exact_.tile);
                    measure_candidates(p, c, first + s * LANES, k, rows, *block_[s]);
                    if (left_ >= 0) continue;
                    trial_.end(false);
                    return false;
                }
            }
        trial_.end(true);
        for (int64_t s = 0; s < blocks; ++s) decide(p, c, first + s * LANES, end, *block_[s]);
        return true;
    }

  private:
    // Of a product of all columns, what the projection and the measured pairs may cost together. A
    // pair takes as long as so many multiply-adds of the product for each column, and so many
    // besides. [least squares over 54 passes; AMD EPYC, Zen 3, 2026-11-27; half of the rest for
    // the screen, not measured]
    static constexpr float WORTH = HAS_BF16 ? 0.35f : 0.75f, PAIR_COLUMN = 1.8f, PAIR = 550.0f;
    // Units that are not tried after one that was given up.
    static constexpr int64_t SPARED_UNITS = 63;

    struct Block {
        Queries queries;
        unsigned in_range[VECTORS];          // lanes
        alignas(64) float threshold[LANES];  // no centroid up to this score can be the nearest
        alignas(64) float best[LANES], second[LANES];  // distances
        int64_t label[LANES], before[LANES];
    };

    void make_basis(const Basis& b, const Centroids& c, Team* team, float* packed, float* buffer,
                    float* values) {
        pack_start(b, c, c_.dtype, *team, buffer, values);
        team_barrier(team);
        Queries& queries = block_[0]->queries;
        queries.packed = packed;
        __builtin_memset(sums_, 0, b.columns * b.padded() * sizeof(float));
        for (int64_t k = team->rank * LANES; k < c.k; k += team->size * LANES) {
            const auto count = static_cast<int>(smaller(LANES, c.k - k));
            pack_queries<FloatPath>(c.rows, c_.dtype, c.given, {k, nullptr, count}, c,
                                    exact_.staged, queries);
            add_step(b, packed, projected_[0], tile_, sums_);
        }
        for (int turn = 0; turn < team->size; ++turn) {
            if (turn == team->rank)
                for (int64_t e = 0; e < b.columns * b.padded(); ++e)
                    b.rows[e] = turn == 0 ? sums_[e] : b.rows[e] + sums_[e];
            team_barrier(team);
        }
        if (team->rank == 0)
            for (int64_t i = 0; i < b.columns; ++i) orthonormalize(b, i);
        team_barrier(team);
        for (int64_t i = team->rank; i < b.columns; i += team->size) pack_row(b, i);
        team_barrier(team);
    }

    float distance(const Problem& p, const Centroids& c, int64_t i, int64_t k) const {
        return squared_distance(reinterpret_cast<const float*>(row_at(p.x, c_.dtype, i)),
                                p.x_scale == nullptr ? 1.0f : p.x_scale[i],
                                reinterpret_cast<const float*>(row_at(c.rows, c_.dtype, k)),
                                c.scale_of(k), c.d);
    }

    // By how much a distance may differ from the exact one. Scaled values are rounded before they
    // are subtracted.
    float error_of(const Problem& p, const Centroids& c, float square, float distance) const {
        const float own = distance_error(c.d) * distance;
        if (p.x_scale == nullptr && c.given == nullptr) return own;
        const float root = __builtin_sqrtf(distance);
        const float norms = __builtin_sqrtf(square) + p.projection->anchor_norm + root;
        const float lost = 1.3e-7f * norms;
        return 1.01f * (own + lost * (2.0f * root + lost));
    }

    // The nearest one's score is above this where its distance is at most `distance`.
    float threshold_of(const Problem& p, const Centroids& c, const Queries& q, int lane,
                       float distance) const {
        const float square = q.square[lane];
        const float rounded = 6.1e-8f * static_cast<float>(c.d + 8) * square;
        const float score = 0.5f * (square - distance);
        return score - rounded - error_of(p, c, square, distance) -
               2.0f * Bound(c, c.norm, c.prefix).of(square, q.prefix[lane]) -
               2.4e-7f * __builtin_fabsf(score);
    }

    void measure_previous(const Problem& p, const Centroids& c, int64_t first, int count,
                          Block& block) const {
        for (unsigned& lanes : block.in_range) lanes = 0;
        for (int lane = 0; lane < count; ++lane) {
            const int64_t given = p.previous[first + lane];
            const int64_t k = given >= 0 && given < c.k ? given : 0;
            const float to = distance(p, c, first + lane, k);
            const bool in_range = block.queries.square[lane] < HUGE_SQUARE && to < HUGE_SQUARE;
            block.label[lane] = block.before[lane] = k;
            block.best[lane] = in_range ? to : __builtin_inff();
            block.second[lane] = __builtin_inff();
            if (!in_range) continue;
            block.in_range[lane / WIDTH] |= 1u << lane % WIDTH;
            block.threshold[lane] = threshold_of(p, c, block.queries, lane, to);
        }
    }

    // Those of a panel's centroids whose bounds are above the thresholds.
    void measure_candidates(const Problem& p, const Centroids& c, int64_t first, int64_t k,
                            int rows, Block& block) {
        for (int r = 0; r < rows; ++r) {
            const Vec half = broadcast(c.half[k + r]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                const Vec bound = load(exact_.tile + r * LANES + v * WIDTH) - half;
                unsigned lanes = lanes_above(bound, load(block.threshold + v * WIDTH));
                for (lanes &= block.in_range[v]; lanes != 0; lanes &= lanes - 1)
                    measure_one(p, c, first, k + r, v * WIDTH + __builtin_ctz(lanes), block);
            }
        }
    }

    void measure_one(const Problem& p, const Centroids& c, int64_t first, int64_t k, int lane,
                     Block& block) {
        if (k == block.before[lane]) return;
        --left_;
        const float to = distance(p, c, first + lane, k);
        if (!(to < block.best[lane])) {
            if (to < block.second[lane]) block.second[lane] = to;
            return;
        }
        block.second[lane] = block.best[lane];
        block.best[lane] = to;
        block.label[lane] = k;
        block.threshold[lane] = threshold_of(p, c, block.queries, lane, to);
    }

    void decide(const Problem& p, const Centroids& c, int64_t first, int64_t end,
                const Block& block) {
        const int count = static_cast<int>(smaller(LANES, end - first));
        for (int lane = 0; lane < count; ++lane) {
            const float square = block.queries.square[lane];
            const float best = block.best[lane], second = block.second[lane];
            const bool in_range = (block.in_range[lane / WIDTH] >> lane % WIDTH & 1u) != 0;
            if (square != square) {
                exact_.settle(p, c, first + lane, 0);
            } else if (in_range && (second == __builtin_inff() ||
                                    (best + second > 1e-30f &&
                                     second - best > error_of(p, c, square, best) +
                                                         error_of(p, c, square, second)))) {
                exact_.settle(p, c, first + lane, block.label[lane]);
            } else {
                exact_.wait<FloatPath>(
                    p, c, first + lane,
                    in_range ? threshold_of(p, c, block.queries, lane, best) : __builtin_nanf(""));
            }
        }
    }

    const Nearest& c_;
    ExactRows& exact_;
    const bool serves_;
    float share_;       // of all pairs, that may be measured
    int64_t left_ = 0;  // pairs that may still be measured
    Trial trial_{SPARED_UNITS};
    Block* block_[MAX_UNIT];
    float* projected_[MAX_UNIT];
    float *values_, *tile_, *sums_;
};

}  // namespace
}  // namespace ssl_fast
