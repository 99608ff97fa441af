#pragma once
// The epilogue of linear_reconstruction: from a panel of outputs [rows][LANES] of the linear layer,
// in L1, to the loss's slopes in place. Rows of the panel are rows of the input, lanes are outputs,
// so that a row of the target's tile is contiguous in memory.

#include "core/linear_reconstruction.h"
#include "cpu/layout.h"
#include "cpu/pointwise.h"

namespace ssl_fast {
namespace {

inline int64_t element_bytes(Element element) {
    return element == Element::float32 ? 4 : element == Element::uint8 ? 1 : 2;
}

// Where a tile lies in the target, and how much of it there is.
struct Place {
    int64_t row, column;
    int rows, lanes;
};

// What an epilogue adds up over the rows of a tile.
struct TileSums {
    double loss;
    bool outside;
    alignas(64) float slope[LANES];

    void reset() {
        loss = 0.0;
        outside = false;
        __builtin_memset(slope, 0, sizeof slope);
    }
};

// One row of what the loss reads beside the outputs, as fp32. LANES of each are readable.
struct RowSources {
    const float* target;
    const float* weight;
    const float* kept;  // 0 or 1
};

class Sources {
  public:
    explicit Sources(const LinearReconstruction& call)
        : c_(call),
          identity_(call.target_scale == 1.0f && call.target_shift == 0.0f),
          weighted_(call.row_weight != nullptr || call.row_kept != nullptr ||
                    call.element_weight.data != nullptr || call.element_kept.data != nullptr) {}

    // Whether every element counts as much as any other.
    bool plain() const { return !weighted_; }

    // The rows of a target tile are far apart, which no hardware prefetcher follows. The last byte
    // lies in a line of its own where a row begins within a line. On a Zen 4, prefetches of narrow
    // elements come too late or never unless one byte of the row is loaded: a bfloat16 sweep took
    // 325 ms without that load, 250 with it. fp32 rows lose 3% by it.
    void prefetch(const Place& p) const {
        const int64_t size = element_bytes(c_.target_element), bytes = p.lanes * size;
        for (int row = 0; row < p.rows; ++row) {
            const char* at = target_at(p.row + row, p.column);
            if (size < 4) static_cast<void>(*static_cast<const volatile char*>(at));
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 0, 2);
            __builtin_prefetch(at + bytes - 1, 0, 2);
        }
    }

    // A row of a full tile whose elements all count.
    const float* target(const Place& p, int row) {
        const char* at = target_at(p.row + row, p.column);
        if (c_.target_element == Element::float32 && identity_)
            return reinterpret_cast<const float*>(at);
        return wide(at, LANES);
    }

    // Any row.
    RowSources row(const Place& p, int row) {
        const int64_t n = p.row + row;
        if (c_.row_kept != nullptr && c_.row_kept[n] == 0) {
            fill(kept_, 0, 0.0f);
            return {kept_, kept_, kept_};
        }
        const float weight = c_.row_weight != nullptr ? c_.row_weight[n] : 1.0f;
        fill(weight_, 0, weight);
        if (c_.element_weight.data != nullptr) {
            const float* from = static_cast<const float*>(c_.element_weight.data) +
                                n * c_.element_weight.stride + p.column;
            for (int lane = 0; lane < p.lanes; ++lane) weight_[lane] = weight * from[lane];
        }
        fill(kept_, 0, 1.0f);
        if (c_.element_kept.data != nullptr) {
            const uint8_t* from = static_cast<const uint8_t*>(c_.element_kept.data) +
                                  n * c_.element_kept.stride + p.column;
            for (int lane = 0; lane < p.lanes; ++lane) kept_[lane] = from[lane] != 0 ? 1.0f : 0.0f;
        }
        fill(kept_, p.lanes, 0.0f);
        const float* target = wide(target_at(n, p.column), p.lanes);
        if (target != target_ && p.lanes < LANES) {
            __builtin_memcpy(target_, target, p.lanes * sizeof(float));
            target = target_;
        }
        return {target, weight_, kept_};
    }

  private:
    const char* target_at(int64_t row, int64_t column) const {
        return static_cast<const char*>(c_.target.data) +
               (row * c_.target.stride + column) * element_bytes(c_.target_element);
    }

    static void fill(float* values, int first, float value) {
        for (int lane = first; lane < LANES; ++lane) values[lane] = value;
    }

    const float* wide(const char* at, int lanes) {
        const float* values = target_;
        if (c_.target_element == Element::uint8) {
            const uint8_t* bytes = reinterpret_cast<const uint8_t*>(at);
            for (int lane = 0; lane < lanes; ++lane)
                target_[lane] = static_cast<float>(bytes[lane]);
        } else {
            values = widen({at, 0}, static_cast<Dtype>(c_.target_element), 0, lanes, target_);
        }
        if (identity_) return values;
        for (int lane = 0; lane < lanes; ++lane)
            target_[lane] = values[lane] * c_.target_scale + c_.target_shift;
        return target_;
    }

    const LinearReconstruction& c_;
    const bool identity_, weighted_;
    alignas(64) float target_[LANES] = {};
    alignas(64) float weight_[LANES];
    alignas(64) float kept_[LANES];
};

template <Kind KIND, bool POSITIVE>
inline Terms terms_of(Vec x, Vec target, Vec positive, float parameter) {
    if constexpr (POSITIVE)
        return bce_with_logits_terms(x, target, positive);
    else
        return terms<KIND>(x, target, parameter);
}

// All rows of a full tile whose elements all count.
template <Kind KIND, bool POSITIVE, bool SLOPES>
void plain_epilogue(const LinearReconstruction& c, Sources& sources, const Place& p, float* tile,
                    const float* bias, const float* positive, TileSums& sums) {
    constexpr Kind FORMULA = KIND == Kind::bce ? Kind::bce_with_logits : KIND;
    Vec loss[VECTORS], slope[VECTORS], shift[VECTORS], weight[VECTORS];
    Vec above = broadcast(0.0f), below = broadcast(0.0f);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
        loss[v] = slope[v] = broadcast(0.0f);
        shift[v] = load(bias + v * WIDTH);
        weight[v] = POSITIVE ? load(positive + v * WIDTH) : broadcast(1.0f);
    }
    for (int row = 0; row < p.rows; ++row) {
        const float* target = sources.target(p, row);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            float* at = tile + row * LANES + v * WIDTH;
            const Vec t = load(target + v * WIDTH);
            if constexpr (KIND == Kind::bce) {
                above = max(t, above);
                below = max(broadcast(0.0f) - t, below);
            }
            const Terms e =
                terms_of<FORMULA, POSITIVE>(load(at) + shift[v], t, weight[v], c.parameter);
            loss[v] = loss[v] + e.loss;
            if constexpr (SLOPES) {
                slope[v] = slope[v] + e.slope;
                store(at, e.slope);
            }
        }
    }
    Vec total = loss[0];
    for (int v = 1; v < VECTORS; ++v) total = total + loss[v];
    sums.loss += sum_lanes(total);
    if (SLOPES)
        for (int v = 0; v < VECTORS; ++v)
            store(sums.slope + v * WIDTH, load(sums.slope + v * WIDTH) + slope[v]);
    sums.outside |= any_greater(above, broadcast(1.0f)) || any_greater(below, broadcast(0.0f));
}

// Any tile: lanes without an output, weights, masks, losses that are stored.
template <Kind KIND, bool POSITIVE>
void edge_epilogue(const LinearReconstruction& c, Sources& sources, const Place& p, float* tile,
                   const float* bias, const float* positive, TileSums& sums) {
    constexpr Kind FORMULA = KIND == Kind::bce ? Kind::bce_with_logits : KIND;
    const Vec zero = broadcast(0.0f);
    alignas(64) float losses[LANES];
    for (int row = 0; row < p.rows; ++row) {
        const RowSources from = sources.row(p, row);
        Vec total = zero;
        for (int v = 0; v < LANES; v += WIDTH) {
            float* at = tile + row * LANES + v;
            const Vec kept = load(from.kept + v), weight = load(from.weight + v);
            const Vec t = select_greater(kept, zero, load(from.target + v), zero);
            if (KIND == Kind::bce)
                sums.outside |= any_greater(t, broadcast(1.0f)) || any_greater(zero, t);
            const Vec x = select_greater(kept, zero, load(at) + load(bias + v), zero);
            const Vec of_positive = POSITIVE ? load(positive + v) : broadcast(1.0f);
            const Terms e = terms_of<FORMULA, POSITIVE>(x, t, of_positive, c.parameter);
            const Vec loss = select_greater(kept, zero, e.loss * weight, zero);
            const Vec slope = select_greater(kept, zero, e.slope * weight, zero);
            total = total + loss;
            store(losses + v, loss);
            store(at, slope);
            store(sums.slope + v, load(sums.slope + v) + slope);
        }
        sums.loss += sum_lanes(total);
        if (c.losses != nullptr)
            __builtin_memcpy(c.losses + (p.row + row) * c.d + p.column, losses,
                             p.lanes * sizeof(float));
    }
}

template <Kind KIND, bool POSITIVE>
void epilogue_of(const LinearReconstruction& c, Sources& sources, const Place& p, float* tile,
                 const float* bias, const float* positive, bool slopes, TileSums& sums) {
    if (p.lanes < LANES || !sources.plain() || c.losses != nullptr)
        edge_epilogue<KIND, POSITIVE>(c, sources, p, tile, bias, positive, sums);
    else if (slopes)
        plain_epilogue<KIND, POSITIVE, true>(c, sources, p, tile, bias, positive, sums);
    else
        plain_epilogue<KIND, POSITIVE, false>(c, sources, p, tile, bias, positive, sums);
}

// The panel's rows become slopes; `bias` and `positive` are those of its lanes.
inline void epilogue(const LinearReconstruction& c, Sources& sources, const Place& p, float* tile,
                     const float* bias, const float* positive, bool slopes, TileSums& sums) {
    switch (c.kind) {
        case Kind::mse:
            return epilogue_of<Kind::mse, false>(c, sources, p, tile, bias, positive, slopes, sums);
        case Kind::l1:
            return epilogue_of<Kind::l1, false>(c, sources, p, tile, bias, positive, slopes, sums);
        case Kind::smooth_l1:
            return epilogue_of<Kind::smooth_l1, false>(c, sources, p, tile, bias, positive, slopes,
                                                       sums);
        case Kind::huber:
            return epilogue_of<Kind::huber, false>(c, sources, p, tile, bias, positive, slopes,
                                                   sums);
        case Kind::bce:
            if (c.pos_weight != nullptr)
                return epilogue_of<Kind::bce, true>(c, sources, p, tile, bias, positive, slopes,
                                                    sums);
            return epilogue_of<Kind::bce, false>(c, sources, p, tile, bias, positive, slopes, sums);
        default:
            if (c.pos_weight != nullptr)
                return epilogue_of<Kind::bce_with_logits, true>(c, sources, p, tile, bias, positive,
                                                                slopes, sums);
            return epilogue_of<Kind::bce_with_logits, false>(c, sources, p, tile, bias, positive,
                                                             slopes, sums);
    }
}

}  // namespace
}  // namespace ssl_fast
