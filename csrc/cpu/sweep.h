#pragma once
// One sweep over the keys for each sub-block of queries: what pair_softmax and pair_sigmoid share.
//
// The loss pass needs three products instead of four: a row block keeps its strip of exponentials
// [keys][queries] relative to a reference (weights.h). Once a row's statistics are complete, the
// factor from exponential to weight goes into the right operand of the query sum. The key sum is
// taken at once, while the group is in cache, and rescaled in the rare case that the reference
// moves.
//
// Work is shared out by sub-blocks of queries (logits, key sum) and then by groups of keys (query
// sum). Every sum runs in index order whatever the block size, so the bits depend neither on the
// number of threads nor on the size of the workspace.

#include "core/pair_sigmoid.h"
#include "cpu/finish.h"
#include "cpu/kernels.h"
#include "cpu/sigmoid.h"

namespace ssl_fast {
namespace {

// The strip of a row block, and so most of the workspace.
constexpr int64_t STRIP_BYTES = int64_t{32} << 20;
// Sub-blocks that share a group of keys while it is in L2, and that the query sum takes at a time
// (128 rows of its right operand fit L1).
constexpr int64_t UNIT = 2;
// What the sub-blocks of a row block leave for the statistics of the keys.
constexpr int64_t COLUMN_BYTES = int64_t{4} << 20;
// Up to so many sub-blocks pack a group of keys again each time they come to it, which costs less
// than a packed copy of keys that don't stay in cache: a queue of 2^16 keys is used where it lies.
constexpr int64_t FEW_SUBS = 8;
constexpr int64_t CACHED_BYTES = int64_t{8} << 20;

constexpr bool is_sigmoid(const PairSoftmax*) { return false; }
constexpr bool is_sigmoid(const PairSigmoid*) { return true; }

template <class Path, class Call>
class Sweep {
  public:
    using Weight = typename Path::Weight;
    static constexpr bool SIGMOID = is_sigmoid(static_cast<const Call*>(nullptr));

    Sweep(const Call& call, int rank)
        : c_(call),
          subs_(ceil_div(call.n, LANES)),
          strip_(call.grad_key != nullptr),
          accumulate_(call.grad_query != nullptr || call.grad_scale != nullptr ||
                      call.grad_query_scale != nullptr || call.expectation != nullptr),
          columns_asked_(call.pass == Pass::forward && call.column_lse != nullptr),
          padded_d_(round_up(call.d, LANES)) {
        keys_.m = c_.m;
        keys_.d = c_.d;
        const int64_t groups = keys_.groups();
        // An in-batch positive's norm is looked up among the keys'.
        in_place_ = !strip_ && subs_ <= FEW_SUBS && c_.m * c_.d * 4 > CACHED_BYTES &&
                    (c_.pass != Pass::loss || c_.positive.data != nullptr);
        width_ = round_up(c_.m, GROUP);
        unit_ = subs_ >= UNIT * c_.threads ? UNIT : 1;
        block_ = subs_;
        if (strip_) {
            const int64_t sub_bytes = larger(1, groups) * GROUP * LANES * sizeof(Weight);
            const int64_t busy = unit_ * c_.threads;
            block_ = larger(busy, smaller(2 * busy, STRIP_BYTES / sub_bytes));
            block_ = smaller(round_up(block_, unit_), subs_);
        }
        if (columns_asked_) {
            const int64_t busy = unit_ * c_.threads, sub_bytes = larger(1, width_) * 8;
            block_ = smaller(larger(busy, COLUMN_BYTES / sub_bytes / busy * busy), subs_);
        }
        Arena arena(c_.workspace);
        counters_ = arena.take<int>(2 * blocks());
        if (!in_place_) {
            keys_.packed = arena.take<float>(Path::packed_key_floats(c_.m, c_.d));
            keys_.scale = arena.take<float>(width_);
        }
        if (columns_asked_) {
            column_reference_ = arena.take<float>((1 + block_) * width_);
            column_sum_ = arena.take<float>((1 + block_) * width_);
        }
        query_scale_ = arena.take<float>(subs_ * LANES);
        coefficient_ = arena.take<float>(subs_ * LANES);
        if (strip_) {
            weights_ = arena.take<Weight>(groups * block_ * GROUP * LANES);
            group_reference_ = arena.take<float>(groups * block_ * LANES);
            final_reference_ = arena.take<float>(block_ * LANES);
            final_factor_ = arena.take<float>(block_ * LANES);
            scaled_queries_ = arena.take<float>(block_ * LANES * padded_d_);
            weighted_ = arena.take<float>(padded_d_ / LANES * block_ * Path::WEIGHTED_FLOATS);
            const bool direct = c_.dtype == Dtype::float32 && padded_d_ == c_.d;
            query_sums_ = direct ? static_cast<float*>(c_.grad_key)
                                 : arena.take<float>(round_up(c_.m, Path::PANEL) * padded_d_);
        }
        const std::size_t shared_bytes = arena.used();
        for (int r = 0; r <= rank; ++r) take_own(arena);
        bytes_ = shared_bytes + (arena.used() - shared_bytes) / (rank + 1) * c_.threads;
    }

    std::size_t bytes() const { return bytes_; }

    void run(Team* team) {
        const FlushSubnormals flush;
        if (team->rank == 0) __builtin_memset(counters_, 0, 2 * blocks() * sizeof(int));
        const int64_t groups = keys_.groups();
        const int64_t panels = in_place_ ? 0 : ceil_div(c_.m, Path::PANEL);
        for (int64_t panel = team->rank; panel < panels; panel += team->size) {
            pack_keys<Path>(c_.key, c_.dtype, c_.key_scale, c_.normalize, panel, keys_,
                            buffers_.row);
            if (strip_) clear_sums(panel);
        }
        // Whole groups read a strip once; where they are few, their columns are shared out too.
        const bool split = groups < 4 * team->size;
        const int64_t columns = padded_d_ / LANES, parts = split ? columns : 1;
        team_barrier(team);
        for (int64_t block = 0; block < blocks(); ++block) {
            const int64_t first = block * block_, subs = smaller(block_, subs_ - first);
            for (int64_t unit; (unit = take(2 * block)) * unit_ < subs;)
                sweep(first, unit * unit_, smaller(unit_, subs - unit * unit_));
            if (!strip_ && !columns_asked_) continue;
            team_barrier(team);
            if (columns_asked_) {
                for (int64_t g = team->rank; g < groups; g += team->size)
                    merge_group(g, block, subs);
                team_barrier(team);
                continue;
            }
            for (int64_t item; (item = take(2 * block + 1)) < groups * parts;)
                sum_queries(item / parts, subs, split ? item % parts : 0, split ? 1 : columns);
            team_barrier(team);
        }
        if (columns_asked_ && subs_ == 0 && team->rank == 0)
            for (int64_t j = 0; j < c_.m; ++j) c_.column_lse[j] = -__builtin_inff();
        if (!strip_) return;
        for (int64_t panel = team->rank; panel < panels; panel += team->size) finish_keys(panel);
    }

  private:
    // What one sub-block carries through the sweep.
    struct SubBlock {
        alignas(64) float maximum[LANES];
        alignas(64) float reference[LANES];
        alignas(64) float sum[LANES];
        alignas(64) float scale[LANES];  // of the logits, times log2(e)
        alignas(64) float row_lse[LANES];
        alignas(64) float row_grad[LANES];  // of the sigmoid: the row's weight
        alignas(64) float lost[LANES], weight[LANES], positive[LANES];
        alignas(64) int64_t ids[MAX_IDS][LANES];
        float* packed;   // the queries
        float* key_sum;  // [D][LANES]

        Statistics statistics() { return {maximum, reference, sum}; }
    };

    int64_t blocks() const { return block_ == 0 ? 0 : ceil_div(subs_, block_); }
    int64_t take(int64_t counter) const {
        return __atomic_fetch_add(counters_ + counter, 1, __ATOMIC_RELAXED);
    }

    void take_own(Arena& arena) {
        for (int64_t s = 0; s < unit_; ++s) {
            own_[s] = arena.take<SubBlock>(1);
            packed_[s] = arena.take<float>(Path::depth(c_.d) * LANES);
            sums_[s] = arena.take<float>(Path::key_sum_rows(c_.d) * LANES);
        }
        logits_ = arena.take<float>(GROUP * LANES);
        pairs_ = arena.take<float>(Path::BF16 ? GROUP / 2 * LANES : 0);
        own_weighted_ = arena.take<float>(strip_ ? UNIT * Path::WEIGHTED_FLOATS : 0);
        staged_ = arena.take<float>(LANES * padded_d_);
        columns_ = arena.take<float>(c_.column_lse != nullptr ? 2 * GROUP : 0);
        if (in_place_) {
            own_keys_.packed = arena.take<float>(Path::packed_key_floats(GROUP, c_.d));
            own_keys_.scale = arena.take<float>(GROUP);
        }
        buffers_ = {arena.take<float>(padded_d_), arena.take<float>(padded_d_),
                    arena.take<float>(padded_d_), arena.take<float>(padded_d_)};
    }

    void clear_sums(int64_t panel) const {
        const int64_t key = panel * Path::PANEL;
        const int64_t rows =
            query_sums_ == c_.grad_key ? smaller(Path::PANEL, c_.m - key) : Path::PANEL;
        __builtin_memset(query_sums_ + key * padded_d_, 0, rows * padded_d_ * sizeof(float));
    }

    void sweep(int64_t first, int64_t begin, int64_t count) {
        for (int64_t s = 0; s < count; ++s) prepare(first, begin + s, *own_[s], s);
        for (int64_t group = 0; group < keys_.groups(); ++group) {
            if (in_place_) pack_group(group);
            for (int64_t s = 0; s < count; ++s) sweep_group(first, begin + s, group, *own_[s]);
        }
        for (int64_t s = 0; s < count; ++s) finish(first, begin + s, *own_[s]);
    }

    void pack_group(int64_t group) {
        const Block b = keys_.block(group);
        own_keys_.m = b.keys;
        own_keys_.d = c_.d;
        const Rows rows{row_at(c_.key, c_.dtype, b.key), c_.key.stride};
        const float* scale = c_.key_scale == nullptr ? nullptr : c_.key_scale + b.key;
        for (int64_t panel = 0; panel * Path::PANEL < b.keys; ++panel)
            pack_keys<Path>(rows, c_.dtype, scale, c_.normalize, panel, own_keys_, buffers_.row);
    }
    const float* packed_keys(int64_t group) const {
        return in_place_ ? own_keys_.packed : keys_.packed + Path::group_offset(group, c_.d);
    }
    // Of a group's keys.
    const float* key_scale(int64_t group) const {
        return in_place_ ? own_keys_.scale : keys_.scale + group * GROUP;
    }

    void prepare(int64_t first, int64_t sub, SubBlock& own, int64_t slot) {
        own.packed = packed_[slot];
        own.key_sum = sums_[slot];
        own.statistics().reset(LANES);
        __builtin_memset(own.lost, 0, sizeof own.lost);
        __builtin_memset(own.weight, 0, sizeof own.weight);
        if (accumulate_)
            __builtin_memset(own.key_sum, 0, Path::key_sum_rows(c_.d) * LANES * sizeof(float));
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t i = (first + sub) * LANES + lane;
            const bool exists = i < c_.n;
            const float* row = exists ? widen(c_.query, c_.dtype, i, c_.d, buffers_.row) : nullptr;
            const float scale = !exists                 ? 0.0f
                                : c_.pass != Pass::loss ? c_.query_scale[i]
                                : c_.normalize          ? *c_.scale * inverse_norm(row, c_.d)
                                                        : *c_.scale;
            query_scale_[i] = scale;
            own.scale[lane] = scale * LOG2E;
            for (int id = 0; id < c_.exclusion.n_ids; ++id)
                own.ids[id][lane] = exists ? c_.exclusion.query_ids[id][i] : 0;
            if constexpr (SIGMOID) {
                own.row_grad[lane] = !exists                    ? 0.0f
                                     : c_.row_weight != nullptr ? c_.row_weight[i]
                                                                : 1.0f;
            } else if (c_.pass == Pass::backward) {
                const GivenRow row_of =
                    exists ? given_row(c_.row_lse[i], c_.row_grad[i]) : GivenRow{0.0f, 0.0f};
                own.row_lse[lane] = row_of.lse;
                own.row_grad[lane] = row_of.grad;
            }
            float* scaled = scaled_row(sub, lane);
            if (!Path::BF16 || strip_) {
                for (int64_t e = 0; exists && e < c_.d; ++e) scaled[e] = row[e] * own.scale[lane];
                const int64_t used = exists ? c_.d : 0;
                __builtin_memset(scaled + used, 0, (padded_d_ - used) * sizeof(float));
            }
            if (Path::BF16) {
                char* bits = reinterpret_cast<char*>(staged_ + lane * padded_d_);
                const int64_t used = exists ? c_.d * 2 : 0;
                if (exists) __builtin_memcpy(bits, row_at(c_.query, c_.dtype, i), used);
                __builtin_memset(bits + used, 0, padded_d_ * 4 - used);
            }
        }
        Path::pack_queries(Path::BF16 ? staged_ : scaled_row(sub, 0), padded_d_, c_.d, own.packed);
    }

    // A query times its scale and log2(e). Kept until the query sum where there is one.
    float* scaled_row(int64_t sub, int lane) const {
        return (strip_ ? scaled_queries_ + sub * LANES * padded_d_ : staged_) + lane * padded_d_;
    }

    float* weighted(int64_t column, int64_t sub) const {
        return weighted_ + (column / LANES * block_ + sub) * Path::WEIGHTED_FLOATS;
    }

    Weight* strip(int64_t group, int64_t sub) const {
        return weights_ + (group * block_ + sub) * GROUP * LANES;
    }

    void sweep_group(int64_t first, int64_t sub, int64_t group, SubBlock& own) {
        Block b = keys_.block(group);
        b.query = (first + sub) * LANES;
        b.queries = static_cast<int>(smaller(LANES, c_.n - b.query));
        const int rows = static_cast<int>(round_up(b.keys, Path::PANEL));
        const float* packed = packed_keys(group);
        float* logits = logits_;
        if constexpr (!Path::BF16)
            if (strip_) logits = strip(group, sub);
        for (int row = 0; row < rows; row += Path::PANEL)
            sweep_panel(packed, rows, row, group, sub, b, logits, own);

        if (strip_)
            __builtin_memcpy(group_reference_ + (group * block_ + sub) * LANES, own.reference,
                             sizeof own.reference);
        if (!strip_ && !accumulate_) return;
        if (b.queries < LANES) fill_lanes(logits, rows, b.queries, 0.0f);
        const float* weights = logits;
        if constexpr (Path::BF16) {
            round_weights(logits, rows, key_scale(group), strip_ ? strip(group, sub) : nullptr,
                          accumulate_ ? pairs_ : nullptr);
            weights = pairs_;
        }
        if (accumulate_) Path::key_sum(packed, weights, rows, c_.d, own.key_sum);
    }

    // Logits and epilogue of one panel, which stays in L1 between the two.
    void sweep_panel(const float* packed, int rows, int row, int64_t group, int64_t sub,
                     const Block& b, float* logits, SubBlock& own) {
        Block panel = b;
        panel.key += row;
        panel.keys = static_cast<int>(smaller(Path::PANEL, b.keys - row));
        panel.rows = Path::PANEL;
        // Without gradients nobody reads the logits again: one panel's memory stays in L1 for all.
        float* tile = strip_ || accumulate_ ? logits + row * LANES : logits;
        Path::logits(packed, own.packed, rows, row, c_.d, tile);
        if (Path::BF16) scale_logits(own.scale, key_scale(group) + row, panel.rows, tile);
        if constexpr (SIGMOID) {
            sigmoid(panel, tile, own);
        } else {
            softmax(sub, row, panel, tile, logits, own);
        }
    }

    // The epilogues of one panel, sweep_epilogue.h. `sub` counts from the row block's first.
    void softmax(int64_t sub, int row, const Block& panel, float* tile, float* logits,
                 SubBlock& own);
    void sigmoid(const Block& panel, float* tile, SubBlock& own);
    void merge_group(int64_t group, int64_t block, int64_t subs);
    GivenWeights given(const Block& b, const SubBlock& own) const;

    // What is left to do once a row, a row block or all have seen every key, sweep_finish.h.
    void finish(int64_t first, int64_t sub, SubBlock& own);
    RowTerms finish_row(int64_t i, int lane, const SubBlock& own);
    void sum_queries(int64_t group, int64_t subs, int64_t first, int64_t columns);
    bool has_final_reference(int64_t group, int64_t sub, int count) const;
    void weigh_again(int64_t group, int64_t sub, int count, int64_t column);
    void finish_keys(int64_t panel);

    const Call& c_;
    const int64_t subs_;
    const bool strip_, accumulate_, columns_asked_;
    const int64_t padded_d_;
    bool in_place_;
    int64_t width_;         // the keys, padded to whole groups
    int64_t unit_, block_;  // in sub-blocks
    std::size_t bytes_;

    PackedKeys keys_;
    int* counters_;
    float *query_scale_, *coefficient_;
    Weight* weights_ = nullptr;         // [group][sub-block][GROUP][LANES]
    float* group_reference_ = nullptr;  // [group][sub-block][LANES]
    float *final_reference_ = nullptr, *final_factor_ = nullptr;
    float *scaled_queries_ = nullptr, *weighted_ = nullptr, *query_sums_ = nullptr;
    // [1 + sub-block][M], the first row for all blocks before.
    float *column_reference_ = nullptr, *column_sum_ = nullptr;
    PackedKeys own_keys_;  // one group

    SubBlock* own_[UNIT];
    float *packed_[UNIT], *sums_[UNIT];
    float *logits_, *pairs_, *own_weighted_, *staged_, *columns_;
    RowBuffers buffers_;
};

}  // namespace
}  // namespace ssl_fast
