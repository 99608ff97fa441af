#pragma once
// The nearest centroids of rows by way of the screen.

#include "cpu/exact_rows.h"
#include "cpu/screen.h"

namespace ssl_fast {
namespace {

#if defined(__AVX512BF16__)

// Units that are not screened after rows that the screen has left undecided.
constexpr int64_t SPARED_BY_SCREEN = 31;

class ScreenRows {
  public:
    ScreenRows(const Nearest& call, ExactRows& exact)
        : c_(call), exact_(exact), serves_(screens(call.k, call.d)) {}

    void take(Arena& arena, int64_t unit) {
        if (!serves_) return;
        for (int64_t s = 0; s < unit; ++s) block_[s] = arena.take<Screened>(1);
        wide_ = arena.take<float>(c_.d * LANES);
    }
    void begin() { trial_.begin(); }
    // How many of the next `rows` rows are screened.
    int64_t share(int64_t rows) { return serves_ ? trial_.share(rows) : 0; }

    // As NearestRows::assign, with packed rows in `packed`.
    void assign(const Problem& p, const Centroids& c, int64_t first, int64_t end, Ahead ahead,
                float* const* packed) {
        const int64_t blocks = ceil_div(end - first, LANES);
        alignas(64) float scale[LANES];
        for (int64_t s = 0; s < blocks; ++s) {
            const int64_t row = first + s * LANES;
            Screened& block = *block_[s];
            block.packed = packed[s];
            load_queries<FloatPath>(p.x, c_.dtype, p.x_scale,
                                    {row, nullptr, static_cast<int>(smaller(LANES, end - row))},
                                    c.d, exact_.staged, wide_, scale);
            if (p.x_scale == nullptr && !c.anchored)
                round_queries<true>(c, wide_, scale, block);
            else
                round_queries<false>(c, wide_, scale, block);
            block.reset();
        }
        const int64_t panels = ceil_div(c.k, Bf16Path::PANEL);
        const int64_t group = group_panels<Bf16Path>(c.d);
        const int64_t lines = ceil_div(ahead.lines(), panels * blocks);
        {
            const PathScope<Bf16Path> scope;
            for (int64_t g = 0; g < panels; g += group)
                for (int64_t s = 0; s < blocks; ++s)
                    for (int64_t panel = g; panel < smaller(g + group, panels); ++panel) {
                        const int64_t k = panel * Bf16Path::PANEL;
                        const int rows = static_cast<int>(smaller(Bf16Path::PANEL, c.k - k));
                        ahead.fetch(lines);
                        screen_products(c, panel, rows, packed[s], exact_.tile);
                        screen_panel(c, k, rows, exact_.tile, *block_[s]);
                    }
        }
        int64_t undecided = 0;
        for (int64_t s = 0; s < blocks; ++s)
            undecided += decide_screened(p, c, first + s * LANES, end, *block_[s]);
        // A row that the screen leaves undecided costs more than one that it has not seen.
        trial_.end(4 * undecided <= end - first);
    }

  private:
    // Returns how many rows have to wait.
    int decide_screened(const Problem& p, const Centroids& c, int64_t first, int64_t end,
                        const Screened& block) {
        const auto rows = static_cast<int>(smaller(LANES, end - first));
        int undecided = 0;
        for (int v = 0; v < rows; v += WIDTH) {
            const Vec least = least_scores(c, block, 0, v);
            const auto here =
                static_cast<__mmask16>(rows - v < WIDTH ? (1u << (rows - v)) - 1 : 0xffffu);
            const auto in_range =
                static_cast<__mmask16>(below(load(block.square + v), HUGE_SQUARE) &
                                       below(_mm512_abs_ps(load(block.best[0] + v)), HUGE_SCORE));
            const auto decided = static_cast<__mmask16>(
                here & in_range & _mm512_cmp_ps_mask(load(block.best[1] + v), least, _CMP_LT_OQ));
            store_labels(p.labels + first + v, load(block.index[0] + v), decided);
            if (p.distances != nullptr)
                for (unsigned lanes = decided; lanes != 0; lanes &= lanes - 1)
                    exact_.measure(p, c, first + v + __builtin_ctz(lanes));
            unsigned others = here & ~decided;
            if (others == 0) continue;
            alignas(64) float floor[2][WIDTH];
            store(floor[0], least);
            store(floor[1], least_scores(c, block, 1, v));
            for (; others != 0; others &= others - 1) {
                const int lane = __builtin_ctz(others);
                const bool ranged = (in_range >> lane & 1) != 0;
                undecided += !decide_one(p, c, first, v + lane, ranged, floor[0][lane],
                                         floor[1][lane], block);
            }
        }
        return undecided;
    }

    // A row whose best candidate does not stand out: the second must, or the row waits.
    bool decide_one(const Problem& p, const Centroids& c, int64_t first, int lane, bool in_range,
                    float least, float other, const Screened& block) {
        const float square = block.square[lane];
        const int64_t label = float_to_bits(block.index[0][lane]);
        // A NaN among the columns: there is no nearest.
        if (square != square) {
            exact_.settle(p, c, first + lane, label);
            return true;
        }
        float limit = __builtin_nanf("");
        if (in_range) {
            limit = other > least ? other : least;
            if (block.best[2][lane] < limit) {
                exact_.settle(
                    p, c, first + lane,
                    exact_.nearer(p, c, first + lane, label, float_to_bits(block.index[1][lane])));
                return true;
            }
            const float prefix = static_cast<float>(c.d) * square;
            limit -= Bound(c, c.norm, c.prefix).of(square, prefix) * 1.001f +
                     2.4e-7f * __builtin_fabsf(limit);
        }
        exact_.wait<FloatPath>(p, c, first + lane, limit);
        return false;
    }

    static __mmask16 below(Vec x, float limit) {
        return _mm512_cmp_ps_mask(x, broadcast(limit), _CMP_LT_OQ);
    }
    static void store_labels(int64_t* labels, Vec index, __mmask16 lanes) {
        const __m512i bits = _mm512_castps_si512(index);
        _mm512_mask_storeu_epi64(labels, static_cast<__mmask8>(lanes),
                                 _mm512_cvtepu32_epi64(_mm512_castsi512_si256(bits)));
        _mm512_mask_storeu_epi64(labels + 8, static_cast<__mmask8>(lanes >> 8),
                                 _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(bits, 1)));
    }

    const Nearest& c_;
    ExactRows& exact_;
    const bool serves_;
    Trial trial_{SPARED_BY_SCREEN};
    Screened* block_[MAX_UNIT];
    float* wide_;
};

#else

class ScreenRows {
  public:
    ScreenRows(const Nearest&, ExactRows&) {}
    void take(Arena&, int64_t) {}
    void begin() {}
    int64_t share(int64_t) { return 0; }
    void assign(const Problem&, const Centroids&, int64_t, int64_t, Ahead, float* const*) {}
};

#endif

}  // namespace
}  // namespace ssl_fast
