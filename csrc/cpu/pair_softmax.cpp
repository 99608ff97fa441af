// pair_softmax on the CPU: one sweep over the keys for each sub-block of queries.
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

#include "cpu/finish.h"
#include "cpu/kernels.h"

namespace ssl_fast {
namespace {

// The strip of a row block, and so most of the workspace.
constexpr int64_t STRIP_BYTES = int64_t{32} << 20;
// Sub-blocks that share a group of keys while it is in L2, and that the query sum takes at a time
// (128 rows of its right operand fit L1).
constexpr int64_t UNIT = 2;

template <class Path>
class Sweep {
  public:
    using Weight = typename Path::Weight;

    Sweep(const PairSoftmax& call, int rank)
        : c_(call),
          subs_(ceil_div(call.n, LANES)),
          strip_(call.grad_key != nullptr),
          accumulate_(call.grad_query != nullptr || call.grad_scale != nullptr ||
                      call.grad_query_scale != nullptr),
          padded_d_(round_up(call.d, LANES)) {
        keys_.m = c_.m;
        keys_.d = c_.d;
        const int64_t groups = keys_.groups();
        unit_ = subs_ >= UNIT * c_.threads ? UNIT : 1;
        block_ = subs_;
        if (strip_) {
            const int64_t sub_bytes = larger(1, groups) * GROUP * LANES * sizeof(Weight);
            const int64_t busy = unit_ * c_.threads;
            block_ = larger(busy, smaller(2 * busy, STRIP_BYTES / sub_bytes));
            block_ = smaller(round_up(block_, unit_), subs_);
        }
        Arena arena(c_.workspace);
        counters_ = arena.take<int>(2 * blocks());
        keys_.packed = arena.take<float>(Path::packed_key_floats(c_.m, c_.d));
        keys_.scale = arena.take<float>(round_up(c_.m, GROUP));
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
        const int64_t panels = ceil_div(c_.m, Path::PANEL);
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
            if (!strip_) continue;
            team_barrier(team);
            for (int64_t item; (item = take(2 * block + 1)) < groups * parts;)
                sum_queries(item / parts, subs, split ? item % parts : 0, split ? 1 : columns);
            team_barrier(team);
        }
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
        alignas(64) float row_grad[LANES];
        alignas(64) int64_t ids[LANES];
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
        for (int64_t group = 0; group < keys_.groups(); ++group)
            for (int64_t s = 0; s < count; ++s) sweep_group(first, begin + s, group, *own_[s]);
        for (int64_t s = 0; s < count; ++s) finish(first, begin + s, *own_[s]);
    }

    void prepare(int64_t first, int64_t sub, SubBlock& own, int64_t slot) {
        own.packed = packed_[slot];
        own.key_sum = sums_[slot];
        own.statistics().reset(LANES);
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
            own.ids[lane] = exists && c_.exclusion.query_ids ? c_.exclusion.query_ids[i] : 0;
            if (c_.pass == Pass::backward) {
                const float lse = exists ? c_.row_lse[i] : 0.0f;
                const bool empty = lse == -__builtin_inff();
                own.row_lse[lane] = empty ? 0.0f : lse * LOG2E;
                own.row_grad[lane] = exists && !empty ? c_.row_grad[i] : 0.0f;
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
        const float* packed = keys_.packed + Path::group_offset(group, c_.d);
        float* logits = logits_;
        if constexpr (!Path::BF16)
            if (strip_) logits = strip(group, sub);
        for (int row = 0; row < rows; row += Path::PANEL)
            sweep_panel(packed, rows, row, group, b, logits, own);

        if (strip_)
            __builtin_memcpy(group_reference_ + (group * block_ + sub) * LANES, own.reference,
                             sizeof own.reference);
        if (!strip_ && !accumulate_) return;
        if (b.queries < LANES) fill_lanes(logits, rows, b.queries, 0.0f);
        const float* weights = logits;
        if constexpr (Path::BF16) {
            round_weights(logits, rows, keys_.scale + b.key, strip_ ? strip(group, sub) : nullptr,
                          accumulate_ ? pairs_ : nullptr);
            weights = pairs_;
        }
        if (accumulate_) Path::key_sum(packed, weights, rows, c_.d, own.key_sum);
    }

    // Logits and epilogue of one panel, which stays in L1 between the two.
    void sweep_panel(const float* packed, int rows, int row, int64_t group, const Block& b,
                     float* logits, SubBlock& own) {
        Block panel = b;
        panel.key += row;
        panel.keys = static_cast<int>(smaller(Path::PANEL, b.keys - row));
        panel.rows = Path::PANEL;
        // Without gradients nobody reads the logits again: one panel's memory stays in L1 for all.
        float* tile = strip_ || accumulate_ ? logits + row * LANES : logits;
        Path::logits(packed, own.packed, rows, row, c_.d, tile);
        if (Path::BF16) scale_logits(own.scale, keys_.scale + panel.key, panel.rows, tile);
        exclude(c_.exclusion, c_.exclusion.query_ids != nullptr ? own.ids : nullptr, panel, tile);
        if (c_.pass == Pass::backward) {
            given_weights(tile, panel.rows, given(panel, own));
            return;
        }
        alignas(64) float correction[LANES];
        if (!strip_ && !accumulate_) {
            online_softmax<false>(tile, panel.rows, own.statistics(), correction);
        } else if (online_softmax<true>(tile, panel.rows, own.statistics(), correction)) {
            rescale(correction, row, logits);
            if (accumulate_ && group > 0)
                rescale(correction, Path::key_sum_rows(c_.d), own.key_sum);
        }
    }

    GivenWeights given(const Block& b, const SubBlock& own) const {
        if (c_.column_lse == nullptr) return {own.row_lse, own.row_grad, nullptr, nullptr};
        for (int row = 0; row < b.rows; ++row) {
            const float lse = row < b.keys ? c_.column_lse[b.key + row] : 0.0f;
            const bool empty = lse == -__builtin_inff();
            columns_[row] = empty ? 0.0f : lse * LOG2E;
            columns_[GROUP + row] = row < b.keys && !empty ? c_.column_grad[b.key + row] : 0.0f;
        }
        return {own.row_lse, own.row_grad, columns_, columns_ + GROUP};
    }

    // Statistics, loss and the rows' own gradients, once a sub-block has seen every key.
    void finish(int64_t first, int64_t sub, SubBlock& own) {
        alignas(64) float factor[LANES];
        if (accumulate_) transpose_sums(own.key_sum, c_.d, staged_, padded_d_);
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t i = (first + sub) * LANES + lane;
            RowTerms t{};
            if (i < c_.n) t = finish_row(i, lane, own);
            factor[lane] = LN2 * (c_.pass == Pass::loss ? t.factor : 1.0f);
            coefficient_[i] = t.coefficient;
        }
        if (!strip_) return;
        __builtin_memcpy(final_factor_ + sub * LANES, factor, sizeof factor);
        __builtin_memcpy(final_reference_ + sub * LANES, own.reference, sizeof own.reference);
        for (int64_t column = 0; column < padded_d_; column += LANES)
            Path::pack_weighted(scaled_row(sub, 0) + column, padded_d_, factor,
                                weighted(column, sub));
    }

    RowTerms finish_row(int64_t i, int lane, const SubBlock& own) {
        const float maximum = own.maximum[lane], reference = own.reference[lane];
        const float* key_sum = accumulate_ ? staged_ + lane * padded_d_ : nullptr;
        if (c_.pass == Pass::loss)
            return finish_loss(c_, i, maximum, reference, own.sum[lane], key_sum, query_scale_[i],
                               c_.positive.data == nullptr ? keys_.scale[i] : 0.0f, buffers_);
        const RowTerms t = row_terms(maximum, reference, own.sum[lane], 0.0f);
        if (c_.pass == Pass::forward) {
            c_.row_lse[i] = t.lse;
            c_.row_max[i] = t.maximum;
        } else if (accumulate_) {
            finish_given(c_, i, key_sum, buffers_);
        }
        return t;
    }

    // The query sum of one group, in `columns` columns of LANES from `first`.
    void sum_queries(int64_t group, int64_t subs, int64_t first, int64_t columns) {
        const Block b = keys_.block(group);
        const int rows =
            query_sums_ == c_.grad_key ? b.keys : static_cast<int>(round_up(b.keys, Path::PANEL));
        for (int64_t sub = 0; sub < subs; sub += UNIT) {
            const int count = static_cast<int>(smaller(UNIT, subs - sub));
            const bool common = has_final_reference(group, sub, count);
            for (int64_t c = first; c < first + columns; ++c) {
                const int64_t column = c * LANES;
                if (!common) weigh_again(group, sub, count, column);
                Path::query_sum(strip(group, sub), common ? weighted(column, sub) : own_weighted_,
                                count, rows, query_sums_ + b.key * padded_d_ + column, padded_d_);
            }
        }
    }

    bool has_final_reference(int64_t group, int64_t sub, int count) const {
        const float* then = group_reference_ + (group * block_ + sub) * LANES;
        return __builtin_memcmp(then, final_reference_ + sub * LANES,
                                count * LANES * sizeof(float)) == 0;
    }

    // The right operand for a group that was swept before its rows' references last moved.
    void weigh_again(int64_t group, int64_t sub, int count, int64_t column) {
        alignas(64) float factor[LANES];
        for (int s = 0; s < count; ++s) {
            const float* then = group_reference_ + (group * block_ + sub + s) * LANES;
            const int64_t at = (sub + s) * LANES;
            for (int lane = 0; lane < LANES; lane += WIDTH)
                store(factor + lane,
                      load(final_factor_ + at + lane) *
                          exp2(load(then + lane) - load(final_reference_ + at + lane)));
            Path::pack_weighted(scaled_row(sub + s, 0) + column, padded_d_, factor,
                                own_weighted_ + s * Path::WEIGHTED_FLOATS);
        }
    }

    void finish_keys(int64_t panel) {
        const int64_t key = panel * Path::PANEL;
        const bool in_batch = c_.pass == Pass::loss && c_.positive.data == nullptr;
        for (int64_t j = key; j < smaller(key + Path::PANEL, c_.m); ++j) {
            const float* sum = query_sums_ + j * padded_d_;
            if (in_batch && j < c_.n) {
                const float* q = widen(c_.query, c_.dtype, j, c_.d, buffers_.other);
                combine(sum, 1.0f, q, -coefficient_[j] * query_scale_[j], c_.d, buffers_.gradient);
                sum = buffers_.gradient;
            }
            const float* k = widen(c_.key, c_.dtype, j, c_.d, buffers_.row);
            const float along =
                through_norm(k, sum, 1.0f, keys_.scale[j], c_.normalize, c_.d, buffers_.output);
            if (c_.grad_key_scale != nullptr) c_.grad_key_scale[j] = along;
            narrow(buffers_.output, c_.dtype, j, c_.d, c_.grad_key);
        }
    }

    const PairSoftmax& c_;
    const int64_t subs_;
    const bool strip_, accumulate_;
    const int64_t padded_d_;
    int64_t unit_, block_;  // in sub-blocks
    std::size_t bytes_;

    PackedKeys keys_;
    int* counters_;
    float *query_scale_, *coefficient_;
    Weight* weights_ = nullptr;         // [group][sub-block][GROUP][LANES]
    float* group_reference_ = nullptr;  // [group][sub-block][LANES]
    float *final_reference_ = nullptr, *final_factor_ = nullptr;
    float *scaled_queries_ = nullptr, *weighted_ = nullptr, *query_sums_ = nullptr;

    SubBlock* own_[UNIT];
    float *packed_[UNIT], *sums_[UNIT];
    float *logits_, *pairs_, *own_weighted_, *staged_, *columns_;
    RowBuffers buffers_;
};

std::size_t workspace_bytes(const PairSoftmax& call) {
    return with_path(call.dtype, [&](auto path) {
        return Sweep<typename decltype(path)::type>(call, 0).bytes();
    });
}

void run(const PairSoftmax& call, Team* team) {
    with_path(call.dtype, [&](auto path) {
        using Path = typename decltype(path)::type;
        const PathScope<Path> scope;
        Sweep<Path>(call, team->rank).run(team);
    });
}

}  // namespace

extern const Kernels<PairSoftmax> SSL_FAST_TABLE(pair_softmax);
const Kernels<PairSoftmax> SSL_FAST_TABLE(pair_softmax) = {workspace_bytes, run};

}  // namespace ssl_fast
