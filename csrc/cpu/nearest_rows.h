#pragma once
// The nearest centroid of each row of a range, with what one thread needs for it.
//
// Rows ride on the vector lanes, so the best score, its index and the runner-up are kept lane by
// lane. Where the two best scores are closer than what their roundings can amount to, exact_rows.h
// decides; with many centroids a screen (screen.h) goes before, and with labels to start from a
// projection (projection.h) before both.

#include "cpu/kernels.h"
#include "cpu/pruned_rows.h"
#include "cpu/screen_rows.h"

namespace ssl_fast {
namespace {

class NearestRows {
  public:
    explicit NearestRows(const Nearest& call)
        : c_(call),
          unit_(unit_blocks(call.d)),
          exact_(call),
          pruned_(call, exact_),
          screen_(call, exact_) {}

    void take(Arena& arena) {
        for (int64_t s = 0; s < unit_; ++s) {
            block_[s] = arena.take<Block>(1);
            packed_[s] = arena.take<float>(query_depth(c_.d) * LANES);
        }
        exact_.take(arena);
        pruned_.take(arena, unit_);
        screen_.take(arena, unit_);
    }
    void begin() {
        exact_.begin();
        pruned_.begin();
        screen_.begin();
    }
    // `buffer` and `values` hold round_up(d, 64) floats each.
    void pack_projection(Projection& p, const Centroids& c, Team* team, float* buffer,
                         float* values) {
        pruned_.pack(p, c, team, packed_[0], buffer, values);
    }
    // Blocks of LANES rows that are taken at a time, of `blocks` shared by `threads`.
    int64_t unit(int64_t blocks, int threads) const {
        return larger(1, smaller(unit_, blocks / (4 * threads)));
    }

    // Rows [first, end), at most unit() blocks of them; `ahead` are those that this thread is
    // likely to be given next.
    template <class Path>
    void assign(const Problem& p, const Centroids& c, int64_t first, int64_t end, Ahead ahead) {
        if (const int64_t rows = Path::BF16 ? 0 : pruned_.share(p, end - first);
            rows > 0 && pruned_.assign(p, c, first, first + rows, ahead, packed_)) {
            first += rows;
            if (first == end) return;
        }
        if (const int64_t rows = Path::BF16 ? 0 : screen_.share(end - first); rows > 0) {
            screen_.assign(p, c, first, first + rows, ahead, packed_);
            first += rows;
            if (first == end) return;
        }
        const int64_t blocks = ceil_div(end - first, LANES);
        for (int64_t s = 0; s < blocks; ++s) {
            const int64_t row = first + s * LANES;
            block_[s]->queries.packed = packed_[s];
            pack_queries<Path>(p.x, c_.dtype, p.x_scale,
                               {row, nullptr, static_cast<int>(smaller(LANES, end - row))}, c,
                               exact_.staged, block_[s]->queries);
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
                    panel_products<Path>(c, panel, rows, packed_[s], exact_.tile);
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
        exact_.resolve<Path>(p, c);
    }

  private:
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
                const Vec s = score<SCALED>(c, k, r, v * WIDTH, exact_.tile, block.queries);
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
                exact_.settle(p, c, first + lane, label);
                continue;
            }
            const float margin = in_range ? margin_of(c, q, lane, best, label) : __builtin_inff();
            if (in_range && gap > margin) {
                exact_.settle(p, c, first + lane, label);
                continue;
            }
            // Strictly less than what can still win; a NaN is less than anything.
            exact_.wait<Path>(p, c, first + lane,
                              in_range ? best - 1.001f * margin - 2.4e-7f * __builtin_fabsf(best)
                                       : __builtin_nanf(""));
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

    const Nearest& c_;
    const int64_t unit_;
    ExactRows exact_;
    PrunedRows pruned_;
    ScreenRows screen_;
    Block* block_[MAX_UNIT];
    float* packed_[MAX_UNIT];
};

}  // namespace
}  // namespace ssl_fast
