#pragma once
// Rows whose nearest centroid fp32 scores leave open, and exact distances.
//
// Such a row waits until LANES of them have come together: these are multiplied once more, and
// every centroid within the bound is compared in double. So labels are those of exact arithmetic,
// whatever the instruction set, the blocks or the order of the sums.

#include "core/clustering.h"
#include "cpu/queries.h"

namespace ssl_fast {
namespace {

// Up to so many waiting rows are compared in double with every centroid, which then costs less than
// a product of LANES rows.
constexpr int FEW_FP32 = 8, FEW_BF16 = 2;

struct Projection;  // projection.h

struct Problem {
    Rows x;
    const float* x_scale;     // [N] or null
    const int64_t* previous;  // [N], with a projection
    const Projection* projection;
    int64_t* labels;   // [N]
    float* distances;  // [N] or null
};

// Whether a way of ruling centroids out is taken: LANES rows are tried before whole units are, and
// some units are spared after rows that it was no use for. It must not cost much where it does not
// pay.
class Trial {
  public:
    explicit Trial(int64_t spared) : spared_(spared) {}
    void begin() {
        left_ = 0;
        trusted_ = false;
    }
    // How many of the next `rows` rows are tried.
    int64_t share(int64_t rows) {
        if (--left_ >= 0) return 0;
        return trusted_ ? rows : smaller(rows, LANES);
    }
    void end(bool useful) {
        trusted_ = useful;
        if (!useful) left_ = spared_;
    }

  private:
    const int64_t spared_;  // units
    int64_t left_ = 0;
    bool trusted_ = false;
};

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

class ExactRows {
  public:
    explicit ExactRows(const Nearest& call) : c_(call) {}

    // What is shared with those who score rows first: staged columns and a tile of products.
    void take(Arena& arena) {
        staged = arena.take<float>(LANES * STAGE);
        tile = arena.take<float>(32 * LANES);
        queries_ = arena.take<Queries>(1);
        packed_ = arena.take<float>(query_depth(c_.d) * LANES);
        waiting_ = arena.take<Waiting>(1);
        x_row_ = arena.take<float>(round_up(c_.d, 64));
        v_row_ = arena.take<float>(round_up(c_.d, 64));
        w_row_ = arena.take<float>(round_up(c_.d, 64));
    }
    void begin() { waiting_->count = 0; }

    // The label of a row is known.
    void settle(const Problem& p, const Centroids& c, int64_t i, int64_t label) {
        p.labels[i] = label;
        if (p.distances != nullptr) measure(p, c, i);
    }
    void measure(const Problem& p, const Centroids& c, int64_t i) {
        const int64_t label = p.labels[i];
        p.distances[i] =
            squared_distance(widen(p.x, c_.dtype, i, c_.d, x_row_), x_scale(p, i),
                             widen(c.rows, c_.dtype, label, c_.d, v_row_), c.scale_of(label), c_.d);
    }

    // No centroid that scores up to `below` can be the nearest; a NaN is less than any score.
    template <class Path>
    void wait(const Problem& p, const Centroids& c, int64_t i, float below) {
        Waiting& w = *waiting_;
        w.row[w.count] = i;
        w.below[w.count] = below;
        if (++w.count == LANES) resolve<Path>(p, c);
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

    // Of two centroids, in fp32 where that decides it, else in double; a tie goes to the first.
    int64_t nearer(const Problem& p, const Centroids& c, int64_t i, int64_t one, int64_t two) {
        const int64_t a = smaller(one, two), b = larger(one, two);
        const float* x = widen(p.x, c_.dtype, i, c_.d, x_row_);
        const float* v = widen(c.rows, c_.dtype, a, c_.d, v_row_);
        const float* w = widen(c.rows, c_.dtype, b, c_.d, w_row_);
        const float xs = x_scale(p, i), vs = c.scale_of(a), ws = c.scale_of(b);
        if (p.x_scale == nullptr && c.given == nullptr) {
            const float to_a = squared_distance(x, 1.0f, v, 1.0f, c_.d);
            const float to_b = squared_distance(x, 1.0f, w, 1.0f, c_.d);
            const float gap = to_b - to_a, sum = to_a + to_b;
            if (sum > 1e-30f && sum < HUGE_SQUARE &&
                __builtin_fabsf(gap) > distance_error(c_.d) * sum)
                return gap > 0.0f ? a : b;
        }
        return exact_distance(x, xs, w, ws, c_.d) < exact_distance(x, xs, v, vs, c_.d) ? b : a;
    }
    float *staged, *tile;

  private:
    // Of the waiting rows' scores, once more, those that can still win.
    template <class Path>
    void filter(const Problem& p, const Centroids& c) {
        Waiting& w = *waiting_;
        Queries& queries = *queries_;
        queries.packed = packed_;
        pack_queries<Path>(p.x, c_.dtype, p.x_scale, {0, w.row, w.count}, c, staged, queries);
        const int64_t panels = ceil_div(c.k, Path::PANEL);
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t k = panel * Path::PANEL;
            const int rows = static_cast<int>(smaller(Path::PANEL, c.k - k));
            panel_products<Path>(c, panel, rows, packed_, tile);
            for (int r = 0; r < rows; ++r)
                for (int v = 0; v < LANES; v += WIDTH) {
                    unsigned lanes = lanes_above(score<Path::BF16>(c, k, r, v, tile, queries),
                                                 load(w.below + v));
                    for (; lanes != 0; lanes &= lanes - 1)
                        consider(p, c, k + r, v + __builtin_ctz(lanes));
                }
        }
    }

    struct Waiting {
        int count;
        alignas(64) float below[LANES];  // no centroid up to this score can be the nearest
        int64_t row[LANES], label[LANES];
        double distance[LANES];
    };

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

    static float x_scale(const Problem& p, int64_t i) {
        return p.x_scale == nullptr ? 1.0f : p.x_scale[i];
    }

    const Nearest& c_;
    Queries* queries_;
    float* packed_;
    Waiting* waiting_;
    float *x_row_, *v_row_, *w_row_;
};

}  // namespace
}  // namespace ssl_fast
