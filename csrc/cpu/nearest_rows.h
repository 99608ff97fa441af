#pragma once
// The nearest centroid of each row of a range, with what one thread needs for it.
//
// Rows ride on the vector lanes, so the best score, its index and the runner-up are kept lane by
// lane. Where the two best scores are closer than what their roundings can amount to, the row waits
// until LANES such rows have come together: these are multiplied once more, and every centroid
// within the bound is compared in double. So labels are those of exact arithmetic, whatever the
// instruction set, the blocks or the order of the sums.

#include "core/clustering.h"
#include "cpu/kernels.h"
#include "cpu/queries.h"

namespace ssl_fast {
namespace {

// From here on squares overflow, or are about to.
constexpr float HUGE_SQUARE = 1e36f, HUGE_SCORE = 1e37f;

// Up to so many waiting rows are compared in double with every centroid, which then costs less than
// a product of LANES rows.
constexpr int FEW_FP32 = 8, FEW_BF16 = 2;

struct Problem {
    Rows x;
    const float* x_scale;  // [N] or null
    int64_t* labels;       // [N]
    float* distances;      // [N] or null
};

class NearestRows {
  public:
    explicit NearestRows(const Nearest& call) : c_(call), unit_(unit_blocks(call.d)) {}

    void take(Arena& arena) {
        const int64_t depth = query_depth(c_.d);
        for (int64_t s = 0; s < unit_; ++s) {
            block_[s] = arena.take<Block>(1);
            packed_[s] = arena.take<float>(depth * LANES);
        }
        staged_ = arena.take<float>(LANES * STAGE);
        tile_ = arena.take<float>(32 * LANES);
        again_ = arena.take<Block>(1);
        packed_again_ = arena.take<float>(depth * LANES);
        waiting_ = arena.take<Waiting>(1);
        x_row_ = arena.take<float>(round_up(c_.d, 64));
        v_row_ = arena.take<float>(round_up(c_.d, 64));
    }
    void begin() { waiting_->count = 0; }
    // Blocks of LANES rows that are taken at a time, of `blocks` shared by `threads`.
    int64_t unit(int64_t blocks, int threads) const {
        return larger(1, smaller(unit_, blocks / (4 * threads)));
    }

    // Rows [first, end), at most unit() blocks of them; `ahead` are those that this thread is
    // likely to be given next.
    template <class Path>
    void assign(const Problem& p, const Centroids& c, int64_t first, int64_t end, Ahead ahead) {
        const int64_t blocks = ceil_div(end - first, LANES);
        for (int64_t s = 0; s < blocks; ++s) {
            const int64_t row = first + s * LANES;
            block_[s]->queries.packed = packed_[s];
            pack_queries<Path>(p.x, c_.dtype, p.x_scale,
                               {row, nullptr, static_cast<int>(smaller(LANES, end - row))}, c,
                               staged_, block_[s]->queries);
            block_[s]->reset();
        }
        const bool scaled = Path::BF16 && (p.x_scale != nullptr || c.given != nullptr);
        const int64_t panels = ceil_div(c.k, Path::PANEL);
        const int64_t group = group_panels<Path>(c.d);
        const int64_t lines = ceil_div(ahead.lines(), panels * blocks);
        for (int64_t g = 0; g < panels; g += group)
            for (int64_t s = 0; s < blocks; ++s)
                for (int64_t panel = g; panel < smaller(g + group, panels); ++panel) {
                    const int64_t k = panel * Path::PANEL;
                    const int rows = static_cast<int>(smaller(Path::PANEL, c.k - k));
                    ahead.fetch(lines);
                    panel_products<Path>(c, panel, rows, packed_[s], tile_);
                    if (scaled)
                        compare<true>(c, k, rows, *block_[s]);
                    else
                        compare<false>(c, k, rows, *block_[s]);
                }
        for (int64_t s = 0; s < blocks; ++s) decide<Path>(p, c, first + s * LANES, end, *block_[s]);
    }

    // The rows that wait for a second look.
    template <class Path>
    void resolve(const Problem& p, const Centroids& c) {
        Waiting& w = *waiting_;
        if (w.count == 0) return;
        for (int lane = 0; lane < LANES; ++lane) {
            w.label[lane] = 0;
            w.distance[lane] = __builtin_inf();
        }
        if (w.count > (Path::BF16 ? FEW_BF16 : FEW_FP32)) {
            filter<Path>(p, c);
        } else {
            for (int lane = 0; lane < w.count; ++lane)
                for (int64_t k = 0; k < c.k; ++k) consider(p, c, k, lane);
        }
        for (int lane = 0; lane < w.count; ++lane) settle(p, c, w.row[lane], w.label[lane]);
        w.count = 0;
    }

  private:
    // Of the waiting rows' scores, once more, those that can still win.
    template <class Path>
    void filter(const Problem& p, const Centroids& c) {
        Waiting& w = *waiting_;
        Block& block = *again_;
        block.queries.packed = packed_again_;
        pack_queries<Path>(p.x, c_.dtype, p.x_scale, {0, w.row, w.count}, c, staged_,
                           block.queries);
        const int64_t panels = ceil_div(c.k, Path::PANEL);
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t k = panel * Path::PANEL;
            const int rows = static_cast<int>(smaller(Path::PANEL, c.k - k));
            panel_products<Path>(c, panel, rows, packed_again_, tile_);
            for (int r = 0; r < rows; ++r)
                for (int v = 0; v < LANES; v += WIDTH) {
                    unsigned lanes = lanes_above(
                        score<Path::BF16>(c, k, r, v, tile_, block.queries), load(w.below + v));
                    for (; lanes != 0; lanes &= lanes - 1)
                        consider(p, c, k + r, v + __builtin_ctz(lanes));
                }
        }
    }

    struct Block {
        Queries queries;
        alignas(64) float best[LANES], second[LANES], index[LANES];
        alignas(64) float bound[LANES];

        void reset() {
            for (int v = 0; v < LANES; v += WIDTH) {
                store(best + v, broadcast(-__builtin_inff()));
                store(second + v, broadcast(-__builtin_inff()));
                store(index + v, broadcast(0.0f));
            }
        }
    };
    struct Waiting {
        int count;
        alignas(64) float below[LANES];  // no centroid up to this score can be the nearest
        int64_t row[LANES], label[LANES];
        double distance[LANES];
    };

    template <bool SCALED>
    void compare(const Centroids& c, int64_t k, int rows, Block& block) const {
        Vec best[VECTORS], second[VECTORS], index[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            best[v] = load(block.best + v * WIDTH);
            second[v] = load(block.second + v * WIDTH);
            index[v] = load(block.index + v * WIDTH);
        }
        for (int r = 0; r < rows; ++r) {
            const Vec here = broadcast(c.index[k + r]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                // A NaN leaves all three as they are.
                const Vec s = score<SCALED>(c, k, r, v * WIDTH, tile_, block.queries);
                index[v] = select_greater(s, best[v], here, index[v]);
                second[v] = max(min(best[v], s), second[v]);
                best[v] = max(s, best[v]);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            store(block.best + v * WIDTH, best[v]);
            store(block.second + v * WIDTH, second[v]);
            store(block.index + v * WIDTH, index[v]);
        }
    }

    // A score's error: a chain of multiply-adds errs by eps at each partial sum, |u_1..j| |v_1..j|
    // at most, whose total Cauchy and Schwarz bound by the prefixes; the other terms are the
    // roundings of u, v, 1/2 |v|^2 and of the score. The last one is for products that underflow.
    struct Bound {
        float eps, prefix, norm, square, tiny;
        Bound(const Centroids& c, float norm2, float prefix2)
            : eps(5.9604645e-8f * (1.01f + 1.2e-7f * static_cast<float>(c.d))),
              prefix(__builtin_sqrtf(prefix2)),
              norm(__builtin_sqrtf(norm2)),
              square(norm2),
              tiny(1e-37f * static_cast<float>(c.d)) {}
        float of(float u_square, float u_prefix) const {
            const float u = __builtin_sqrtf(u_square);
            return eps * (__builtin_sqrtf(u_prefix) * prefix + 8.0f * u * norm + 4.0f * square) +
                   tiny * (1.0f + u + norm);
        }
    };

    template <class Path>
    void decide(const Problem& p, const Centroids& c, int64_t first, int64_t end, Block& block) {
        const int count = static_cast<int>(smaller(LANES, end - first));
        const Queries& q = block.queries;
        const Bound all(c, c.norm, c.prefix);
        for (int lane = 0; lane < LANES; ++lane)
            block.bound[lane] = 2.0f * all.of(q.square[lane], q.prefix[lane]);
        for (int lane = 0; lane < count; ++lane) {
            const int64_t label = float_to_bits(block.index[lane]);
            const float best = block.best[lane], gap = best - block.second[lane];
            const bool in_range =
                q.square[lane] < HUGE_SQUARE && best > -HUGE_SCORE && best < HUGE_SCORE;
            // A row with a NaN has no nearest, and the label that nothing has replaced.
            if ((in_range && gap > block.bound[lane]) || q.square[lane] != q.square[lane]) {
                settle(p, c, first + lane, label);
                continue;
            }
            const float margin = in_range ? margin_of(c, q, lane, best, label) : __builtin_inff();
            if (in_range && gap > margin) {
                settle(p, c, first + lane, label);
                continue;
            }
            Waiting& w = *waiting_;
            w.row[w.count] = first + lane;
            // Strictly less than what can still win; a NaN is less than anything.
            w.below[w.count] = in_range ? best - 1.001f * margin - 2.4e-7f * __builtin_fabsf(best)
                                        : __builtin_nanf("");
            if (++w.count == LANES) resolve<Path>(p, c);
        }
    }

    // Twice the error of the scores that matter for a row. What is nearer than the best so far
    // has a norm of at most |u| + |u - v_best|: a far centroid, whose score errs most, is none.
    float margin_of(const Centroids& c, const Queries& q, int lane, float best,
                    int64_t label) const {
        const float square = q.square[lane], prefix = q.prefix[lane];
        const float label_square = 2.0f * c.half[label];
        const auto columns = static_cast<float>(c.d);
        const float slack = Bound(c, label_square, columns * label_square).of(square, prefix);
        const float apart = square * 1.001f - 2.0f * (best - slack);
        const float reach =
            1.01f * (__builtin_sqrtf(square) + __builtin_sqrtf(apart > 0.0f ? apart : 0.0f));
        const float norm = reach * reach < c.norm ? reach * reach : c.norm;
        const float all = columns * norm < c.prefix ? columns * norm : c.prefix;
        return 2.0f * Bound(c, norm, all).of(square, prefix);
    }

    // Centroid k for a waiting row, in double. They come in ascending order: ties keep the first.
    void consider(const Problem& p, const Centroids& c, int64_t k, int lane) {
        Waiting& w = *waiting_;
        if (lane >= w.count) return;
        const int64_t i = w.row[lane];
        const double distance =
            exact_distance(widen(p.x, c_.dtype, i, c_.d, x_row_), x_scale(p, i),
                           widen(c.rows, c_.dtype, k, c_.d, v_row_), c.scale_of(k), c_.d);
        if (!(distance < w.distance[lane])) return;
        w.distance[lane] = distance;
        w.label[lane] = k;
    }

    void settle(const Problem& p, const Centroids& c, int64_t i, int64_t label) const {
        p.labels[i] = label;
        if (p.distances == nullptr) return;
        p.distances[i] =
            squared_distance(widen(p.x, c_.dtype, i, c_.d, x_row_), x_scale(p, i),
                             widen(c.rows, c_.dtype, label, c_.d, v_row_), c.scale_of(label), c_.d);
    }

    static float x_scale(const Problem& p, int64_t i) {
        return p.x_scale == nullptr ? 1.0f : p.x_scale[i];
    }

    const Nearest& c_;
    const int64_t unit_;
    Block* block_[MAX_UNIT];
    float* packed_[MAX_UNIT];
    Block* again_;  // of the rows that wait
    float* packed_again_;
    Waiting* waiting_;
    float *staged_, *tile_, *x_row_, *v_row_;
};

}  // namespace
}  // namespace ssl_fast
