#pragma once
// The sweep of linear_reconstruction over tiles of 96 rows of the input (a group) and LANES outputs
// (a sub-block). A tile's slopes feed both gradient products while they are in cache, and nothing
// of them is kept.
//
// The gradient of the input sums over outputs, that of the weight over rows. One of the two belongs
// to a thread: tickets are blocks of rows (or units of outputs), handed out in order, and a ticket
// walks over all units of outputs (blocks of rows). The other one's sum for what is walked over is
// shared, and takes its terms in the order of the tickets: a thread waits until the ticket before
// its own has added there. Threads so follow each other at a distance of a tile or more, without a
// barrier, and the bits don't depend on their number.

#include "cpu/accumulate.h"
#include "cpu/kernels.h"
#include "cpu/linear_epilogue.h"

namespace ssl_fast {
namespace {

// Sub-blocks of a unit: the input's gradient product takes them together, 128 steps long.
constexpr int UNIT = 2;
// Groups of a block of rows: the weight and its gradient are read once a block.
constexpr int BLOCK_GROUPS = 2;
// A shared gradient of the weight that is larger than this changes the roles: units of outputs are
// handed out.
constexpr int64_t SHARED_BYTES = int64_t{4} << 20;
// A packed copy of the side that is walked over is kept where it isn't larger.
constexpr int64_t KEPT_BYTES = int64_t{8} << 20;

template <class Path>
class LinearSweep {
  public:
    LinearSweep(const LinearReconstruction& call, int rank)
        : c_(call),
          groups_(ceil_div(call.n, GROUP)),
          subs_(ceil_div(call.d, LANES)),
          padded_h_(round_up(call.h, LANES)),
          sum_rows_(Path::key_sum_rows(call.h)),
          slopes_(call.grad_input != nullptr || call.grad_weight != nullptr ||
                  call.grad_bias != nullptr),
          shared_turns_(call.grad_weight != nullptr || call.grad_bias != nullptr),
          sources_(call) {
        by_rows_ = groups_ >= subs_ && subs_ * LANES * sum_rows_ * 4 <= SHARED_BYTES;
        unit_ = subs_ >= 2 * UNIT * c_.threads || by_rows_ ? UNIT : 1;
        height_ = by_rows_ && groups_ >= 4 * BLOCK_GROUPS * c_.threads ? BLOCK_GROUPS : 1;
        units_ = ceil_div(subs_, unit_);
        blocks_ = ceil_div(groups_, height_);
        Arena arena(c_.workspace);
        take_shared(arena);
        const std::size_t shared = arena.used();
        for (int r = 0; r <= rank; ++r) take_own(arena);
        bytes_ = shared + (arena.used() - shared) / (rank + 1) * c_.threads;
    }

    std::size_t bytes() const { return bytes_; }

    void run(Team* team) {
        const FlushSubnormals flush;
        begin(team);
        team_barrier(team);
        Tickets tickets(counter_);
        if (by_rows_)
            while (tickets.take(blocks_)) rows_block(tickets.ticket());
        else
            while (tickets.take(units_)) outputs_unit(tickets.ticket());
        if (outside_) __atomic_store_n(c_.outside, 1, __ATOMIC_RELAXED);
        team_barrier(team);
        end(team);
    }

  private:
    using Weight = typename Path::Weight;
    static constexpr int64_t TILE = GROUP * LANES;

    void take_shared(Arena& arena) {
        counter_ = arena.take<int64_t>(1);
        turns_ = arena.take<int64_t>(by_rows_ ? units_ : groups_);
        totals_ = arena.take<double>(by_rows_ ? groups_ : subs_);
        bias_sums_ = arena.take<double>(c_.grad_bias != nullptr ? subs_ * LANES : 0);
        if (by_rows_) {
            weight_sums_ = arena.take<float>(
                c_.grad_weight != nullptr ? units_ * unit_ * sum_rows_ * LANES : 0);
            kept_ = units_ * unit_floats() * 4 <= KEPT_BYTES;
            packed_units_ = kept_ ? arena.take<float>(units_ * unit_floats()) : nullptr;
        } else {
            kept_ = groups_ * group_floats() * 4 <= KEPT_BYTES;
            packed_groups_ = kept_ ? arena.take<float>(groups_ * group_floats()) : nullptr;
        }
    }

    void take_own(Arena& arena) {
        const bool own_unit = !by_rows_ || !kept_, own_groups = by_rows_ || !kept_;
        own_unit_ = own_unit ? arena.take<float>(unit_floats()) : nullptr;
        own_groups_ = own_groups ? arena.take<float>(height_ * group_floats()) : nullptr;
        own_sums_ =
            arena.take<float>(by_rows_ && c_.grad_input != nullptr     ? height_ * GROUP * padded_h_
                              : !by_rows_ && c_.grad_weight != nullptr ? unit_ * sum_rows_ * LANES
                                                                       : 0);
        tiles_ = arena.take<float>(height_ * unit_ * TILE);
        strips_ = arena.take<Weight>(Path::BF16 ? height_ * unit_ * TILE : 0);
        pairs_ = arena.take<float>(Path::BF16 ? height_ * unit_ * TILE / 2 : 0);
        tile_sums_ = arena.take<TileSums>(height_ * unit_);
        edge_ = arena.take<float>(TILE);
        ones_ = arena.take<float>(GROUP);
        lanes_ = arena.take<float>(2 * LANES);
        rows_ = arena.take<float>(LANES * padded_h_);
        bits_ = arena.take<float>(Path::BF16 ? LANES * padded_h_ : 0);
        buffer_ = arena.take<float>(padded_h_ + LANES);
    }

    // A group of the input, packed for the outputs and for the weight's gradient.
    int64_t group_floats() const { return Path::packed_key_floats(GROUP, c_.h); }
    // A sub-block of the weight packed for the outputs, and a unit packed for both products.
    int64_t sub_floats() const { return Path::depth(c_.h) * LANES; }
    int64_t unit_floats() const {
        return unit_ * (sub_floats() + padded_h_ / LANES * Path::WEIGHTED_FLOATS);
    }

    int group_rows(int64_t group) const {
        return static_cast<int>(smaller(GROUP, c_.n - group * GROUP));
    }
    int padded_rows(int64_t group) const {
        return static_cast<int>(round_up(group_rows(group), Path::PANEL));
    }
    int unit_subs(int64_t unit) const {
        return static_cast<int>(smaller(unit_, subs_ - unit * unit_));
    }
    int sub_lanes(int64_t sub) const {
        return static_cast<int>(smaller(LANES, c_.d - sub * LANES));
    }

    void begin(Team* team) {
        for (int i = 0; i < GROUP; ++i) ones_[i] = 1.0f;
        if (team->rank == 0) {
            *counter_ = 0;
            __builtin_memset(turns_, 0, (by_rows_ ? units_ : groups_) * sizeof(int64_t));
            if (c_.grad_bias != nullptr)
                __builtin_memset(bias_sums_, 0, subs_ * LANES * sizeof(double));
        }
        if (kept_ && by_rows_)
            for (int64_t unit = team->rank; unit < units_; unit += team->size)
                pack_unit(unit, packed_units_ + unit * unit_floats());
        if (kept_ && !by_rows_)
            for (int64_t group = team->rank; group < groups_; group += team->size)
                pack_group(group, packed_groups_ + group * group_floats());
        if (by_rows_ && c_.grad_weight != nullptr) {
            const int64_t floats = unit_ * sum_rows_ * LANES;
            for (int64_t unit = team->rank; unit < units_; unit += team->size)
                __builtin_memset(weight_sums_ + unit * floats, 0, floats * sizeof(float));
        }
        if (!by_rows_ && c_.grad_input != nullptr)
            for (int64_t group = team->rank; group < groups_; group += team->size)
                __builtin_memset(c_.grad_input + group * GROUP * c_.h, 0,
                                 group_rows(group) * c_.h * sizeof(float));
    }

    void end(Team* team) {
        if (team->rank == 0) {
            double total = 0.0;
            for (int64_t i = 0; i < (by_rows_ ? groups_ : subs_); ++i) total += totals_[i];
            *c_.loss = static_cast<float>(total);
            for (int64_t i = 0; c_.grad_bias != nullptr && i < c_.d; ++i)
                c_.grad_bias[i] = static_cast<float>(bias_sums_[i]);
        }
        if (by_rows_ && c_.grad_weight != nullptr)
            for (int64_t sub = team->rank; sub < subs_; sub += team->size)
                write_weight_grad(sub, weight_sums_ + sub * sum_rows_ * LANES);
    }

    // ---- packing

    const float* widened(const Rows& rows, int64_t i) {
        return widen(rows, c_.dtype, i, c_.h, buffer_);
    }

    void pack_group(int64_t group, float* packed) {
        const int rows = padded_rows(group), count = group_rows(group);
        for (int row = 0; row < rows; ++row) {
            const int64_t i = group * GROUP + row;
            // A row that doesn't count may hold NaN, which its slopes of 0 would not keep out.
            const bool counts = row < count && (c_.row_kept == nullptr || c_.row_kept[i] != 0);
            if constexpr (Path::BF16) {
                uint16_t* bits = reinterpret_cast<uint16_t*>(buffer_);
                __builtin_memset(bits, 0, round_up(c_.h, 32) * 2);
                if (counts) __builtin_memcpy(bits, row_at(c_.input, c_.dtype, i), c_.h * 2);
                Path::pack_key_bits(bits, row, rows, c_.h, packed);
            } else {
                const float* values = buffer_;
                if (counts)
                    values = widened(c_.input, i);
                else
                    __builtin_memset(buffer_, 0, c_.h * sizeof(float));
                Path::pack_key(values, 1.0f, row, c_.h, packed);
            }
        }
    }

    void pack_unit(int64_t unit, float* packed) {
        for (int s = 0; s < unit_subs(unit); ++s) {
            const int64_t first = (unit * unit_ + s) * LANES;
            for (int lane = 0; lane < LANES; ++lane) {
                const bool exists = first + lane < c_.d;
                float* row = rows_ + lane * padded_h_;
                const int64_t used = exists ? c_.h : 0;
                if (exists)
                    __builtin_memcpy(row, widened(c_.linear_weight, first + lane), used * 4);
                __builtin_memset(row + used, 0, (padded_h_ - used) * 4);
                if (!Path::BF16) continue;
                char* bits = reinterpret_cast<char*>(bits_ + lane * padded_h_);
                if (exists)
                    __builtin_memcpy(bits, row_at(c_.linear_weight, c_.dtype, first + lane),
                                     used * 2);
                __builtin_memset(bits + used * 2, 0, padded_h_ * 4 - used * 2);
            }
            Path::pack_queries(Path::BF16 ? bits_ : rows_, padded_h_, c_.h,
                               packed + s * sub_floats());
            if (c_.grad_input == nullptr) continue;
            for (int64_t column = 0; column < padded_h_; column += LANES)
                Path::pack_weighted(
                    rows_ + column, padded_h_, ones_,
                    const_cast<float*>(weighted(packed, column)) + s * Path::WEIGHTED_FLOATS);
        }
    }
    const float* weighted(const float* packed_unit, int64_t column) const {
        return packed_unit + unit_ * sub_floats() + column / LANES * unit_ * Path::WEIGHTED_FLOATS;
    }

    // ---- one tile, and the products of its slopes

    void tile(int64_t group, int64_t sub, const float* packed_group, const float* packed_sub,
              int slot) {
        const int rows = padded_rows(group), count = group_rows(group);
        float* tile = tiles_ + slot * TILE;
        TileSums& sums = tile_sums_[slot];
        sums.reset();
        Place p{group * GROUP, sub * LANES, 0, sub_lanes(sub)};
        for (int lane = 0; lane < LANES; ++lane) {
            const bool exists = lane < p.lanes;
            lanes_[lane] = exists && c_.bias != nullptr ? c_.bias[p.column + lane] : 0.0f;
            lanes_[LANES + lane] =
                exists && c_.pos_weight != nullptr ? c_.pos_weight[p.column + lane] : 1.0f;
        }
        for (int row = 0; row < rows; row += Path::PANEL) {
            // Without gradients nobody reads the slopes: one panel's memory serves all.
            float* panel = slopes_ ? tile + row * LANES : tile;
            p.row = group * GROUP + row;
            p.rows = static_cast<int>(smaller(Path::PANEL, count - row));
            sources_.prefetch(p);
            Path::logits(packed_group, packed_sub, rows, row, c_.h, panel);
            epilogue(c_, sources_, p, panel, lanes_, lanes_ + LANES, slopes_, sums);
            if (slopes_ && p.rows < Path::PANEL)
                __builtin_memset(panel + p.rows * LANES, 0,
                                 (Path::PANEL - p.rows) * LANES * sizeof(float));
        }
        outside_ |= sums.outside;
#if defined(__AVX512BF16__)
        if constexpr (Path::BF16)
            if (slopes_)
                round_weights(tile, rows, ones_,
                              c_.grad_input != nullptr ? strips_ + slot * TILE : nullptr,
                              c_.grad_weight != nullptr ? pairs_ + slot * TILE / 2 : nullptr);
#endif
    }

    const Weight* strip(int slot) const {
        if constexpr (Path::BF16)
            return strips_ + slot * TILE;
        else
            return tiles_ + slot * TILE;
    }

    // A unit's part of the input's gradient, for a group's rows. A thread's own sums have whole
    // tiles; what doesn't fill one of the gradient itself goes through a buffer.
    void add_input_grad(int64_t group, int subs, int slot, const float* packed_unit, float* grad,
                        int64_t stride) {
        const int count = group_rows(group), rows = padded_rows(group);
        const bool whole = by_rows_ || !Path::BF16 || count == rows;
        for (int64_t column = 0; column < c_.h; column += LANES) {
            const int64_t width = smaller(LANES, stride - column);
            const float* right = weighted(packed_unit, column);
            float* to = grad + column;
            if (whole && width == LANES) {
                Path::query_sum(strip(slot), right, subs, by_rows_ ? rows : count, to, stride);
                continue;
            }
            for (int row = 0; row < count; ++row)
                __builtin_memcpy(edge_ + row * LANES, to + row * stride, width * sizeof(float));
            Path::query_sum(strip(slot), right, subs, rows, edge_, LANES);
            for (int row = 0; row < count; ++row)
                __builtin_memcpy(to + row * stride, edge_ + row * LANES, width * sizeof(float));
        }
    }

    // A tile's part of the weight's gradient, [H][LANES].
    void add_weight_grad(int64_t group, const float* packed_group, int slot, float* sums) {
        const float* weights = Path::BF16 ? pairs_ + slot * TILE / 2 : tiles_ + slot * TILE;
        Path::key_sum(packed_group, weights, padded_rows(group), c_.h, sums);
    }

    void add_bias_grad(int64_t sub, int slot) {
        for (int lane = 0; lane < LANES; ++lane)
            bias_sums_[sub * LANES + lane] += static_cast<double>(tile_sums_[slot].slope[lane]);
    }

    void write_weight_grad(int64_t sub, const float* sums) {
        transpose_sums(sums, c_.h, rows_, padded_h_);
        for (int lane = 0; lane < sub_lanes(sub); ++lane)
            __builtin_memcpy(c_.grad_weight + (sub * LANES + lane) * c_.h, rows_ + lane * padded_h_,
                             c_.h * sizeof(float));
    }

    // ---- tickets

    void rows_block(int64_t block) {
        const int64_t first = block * height_;
        const int count = static_cast<int>(smaller(height_, groups_ - first));
        for (int g = 0; g < count; ++g) {
            pack_group(first + g, own_groups_ + g * group_floats());
            totals_[first + g] = 0.0;
        }
        if (c_.grad_input != nullptr)
            __builtin_memset(own_sums_, 0, count * GROUP * padded_h_ * sizeof(float));
        for (int64_t unit = 0; unit < units_; ++unit) {
            const int subs = unit_subs(unit);
            const float* packed = kept_ ? packed_units_ + unit * unit_floats() : own_unit_;
            if (!kept_) pack_unit(unit, own_unit_);
            for (int g = 0; g < count; ++g) {
                for (int s = 0; s < subs; ++s) {
                    tile(first + g, unit * unit_ + s, own_groups_ + g * group_floats(),
                         packed + s * sub_floats(), g * unit_ + s);
                    totals_[first + g] += tile_sums_[g * unit_ + s].loss;
                }
                if (c_.grad_input != nullptr)
                    add_input_grad(first + g, subs, g * unit_, packed,
                                   own_sums_ + g * GROUP * padded_h_, padded_h_);
            }
            if (!shared_turns_) continue;
            team_wait(turns_ + unit, block);
            for (int s = 0; s < subs; ++s)
                for (int g = 0; g < count; ++g) {
                    const int64_t sub = unit * unit_ + s;
                    if (c_.grad_weight != nullptr)
                        add_weight_grad(first + g, own_groups_ + g * group_floats(), g * unit_ + s,
                                        weight_sums_ + sub * sum_rows_ * LANES);
                    if (c_.grad_bias != nullptr) add_bias_grad(sub, g * unit_ + s);
                }
            __atomic_store_n(turns_ + unit, block + 1, __ATOMIC_RELEASE);
        }
        if (c_.grad_input == nullptr) return;
        for (int g = 0; g < count; ++g)
            for (int row = 0; row < group_rows(first + g); ++row)
                __builtin_memcpy(c_.grad_input + ((first + g) * GROUP + row) * c_.h,
                                 own_sums_ + (g * GROUP + row) * padded_h_, c_.h * sizeof(float));
    }

    void outputs_unit(int64_t unit) {
        const int subs = unit_subs(unit);
        pack_unit(unit, own_unit_);
        for (int s = 0; s < subs; ++s) totals_[unit * unit_ + s] = 0.0;
        if (c_.grad_weight != nullptr)
            __builtin_memset(own_sums_, 0, unit_ * sum_rows_ * LANES * sizeof(float));
        for (int64_t group = 0; group < groups_; ++group) {
            const float* packed = kept_ ? packed_groups_ + group * group_floats() : own_groups_;
            if (!kept_) pack_group(group, own_groups_);
            for (int s = 0; s < subs; ++s) {
                tile(group, unit * unit_ + s, packed, own_unit_ + s * sub_floats(), s);
                totals_[unit * unit_ + s] += tile_sums_[s].loss;
                if (c_.grad_weight != nullptr)
                    add_weight_grad(group, packed, s, own_sums_ + s * sum_rows_ * LANES);
                if (c_.grad_bias != nullptr) add_bias_grad(unit * unit_ + s, s);
            }
            if (c_.grad_input == nullptr) continue;
            team_wait(turns_ + group, unit);
            add_input_grad(group, subs, 0, own_unit_, c_.grad_input + group * GROUP * c_.h, c_.h);
            __atomic_store_n(turns_ + group, unit + 1, __ATOMIC_RELEASE);
        }
        for (int s = 0; c_.grad_weight != nullptr && s < subs; ++s)
            write_weight_grad(unit * unit_ + s, own_sums_ + s * sum_rows_ * LANES);
    }

    const LinearReconstruction& c_;
    const int64_t groups_, subs_, padded_h_, sum_rows_;
    const bool slopes_, shared_turns_;
    Sources sources_;
    bool by_rows_, kept_, outside_ = false;
    int unit_, height_;
    int64_t units_, blocks_;
    std::size_t bytes_;

    int64_t *counter_, *turns_;
    double *totals_, *bias_sums_;
    float *weight_sums_ = nullptr, *packed_units_ = nullptr, *packed_groups_ = nullptr;
    float *own_unit_, *own_groups_, *own_sums_, *tiles_, *pairs_;
    Weight* strips_;
    TileSums* tile_sums_;
    float *edge_, *ones_, *lanes_, *rows_, *bits_, *buffer_;
};

}  // namespace
}  // namespace ssl_fast
