// The softmax of a symmetric matrix (NT-Xent, SupCon): every row is a query and a key, so each pair
// of row blocks is computed once and serves both. A first half sweep gives the statistics, a second
// one recomputes the logits and takes both sums: two products in all, where the one-sided loss
// spends three.
//
// Block pairs go in rounds of a round-robin tournament: within a round no two pairs share a block,
// so that each sum has one owner at a time and grows in the order of the rounds, whatever the
// number of threads.

#include "cpu/finish.h"
#include "cpu/kernels.h"

namespace ssl_fast {
namespace {

constexpr int64_t BLOCK = 192;  // rows: whole sub-blocks of queries and whole groups of keys
constexpr int64_t SUBS = BLOCK / LANES;
constexpr int64_t GROUPS = BLOCK / GROUP;
static_assert(BLOCK % LANES == 0 && BLOCK % GROUP == 0, "a block is both queries and keys");

template <class Path>
class SymmetricSweep {
  public:
    SymmetricSweep(const PairSoftmaxSymmetric& call, int rank)
        : c_(call),
          rows_(call.n),
          blocks_(ceil_div(rows_, BLOCK)),
          players_(round_up(larger(blocks_, 2), 2)),
          padded_d_(round_up(call.d, LANES)),
          gradient_asked_(call.grad_features != nullptr || call.moment != nullptr),
          rule_(call.exclusion) {
        rule_.n_diagonals = call.pairs > 0 ? 3 : 1;
        rule_.diagonals[1] = call.pairs;
        rule_.diagonals[2] = -call.pairs;
        const int64_t padded = blocks_ * BLOCK, subs = padded / LANES;
        const int64_t depth = gradient_asked_ ? Path::key_sum_rows(c_.d) : 0;
        Arena arena(c_.workspace);
        keys_.m = rows_;
        keys_.d = c_.d;
        counters_ = arena.take<int>(2 * players_);
        keys_.packed = arena.take<float>(Path::packed_key_floats(rows_, c_.d));
        keys_.scale = arena.take<float>(padded);
        queries_ = arena.take<float>(subs * Path::depth(c_.d) * LANES);
        query_scale_ = arena.take<float>(padded);
        statistics_ = {arena.take<float>(padded), arena.take<float>(padded),
                       arena.take<float>(padded)};
        lse_ = arena.take<float>(padded);
        weight_ = arena.take<float>(padded);
        ids_ = arena.take<int64_t>(rule_.n_ids * padded);
        key_sums_ = arena.take<float>(subs * depth * LANES);
        if (gradient_asked_) {
            weighted_ = arena.take<float>(padded_d_ / LANES * subs * Path::WEIGHTED_FLOATS);
            query_sums_ = arena.take<float>(padded * padded_d_);
        }
        const std::size_t shared_bytes = arena.used();
        for (int r = 0; r <= rank; ++r) take_own(arena);
        bytes_ = shared_bytes + (arena.used() - shared_bytes) / (rank + 1) * c_.threads;
    }

    std::size_t bytes() const { return bytes_; }

    void run(Team* team) {
        const FlushSubnormals flush;
        if (team->rank == 0) __builtin_memset(counters_, 0, 2 * players_ * sizeof(int));
        for (int64_t block = team->rank; block < blocks_; block += team->size) prepare(block);
        team_barrier(team);
        if (c_.pass != Pass::backward)
            tournament(team, 0, [this](int64_t i, int64_t j) { collect(i, j); });
        for (int64_t block = team->rank; block < blocks_; block += team->size) finish_rows(block);
        if (!gradient_asked_) return;
        team_barrier(team);
        tournament(team, players_, [this](int64_t i, int64_t j) { differentiate(i, j); });
        for (int64_t block = team->rank; block < blocks_; block += team->size)
            finish_gradient(block);
    }

  private:
    void take_own(Arena& arena) {
        logits_ = arena.take<float>(SUBS * GROUP * LANES);
        strip_ = arena.take<typename Path::Weight>(Path::BF16 ? SUBS * GROUP * LANES : 0);
        pairs_ = arena.take<float>(Path::BF16 ? GROUP / 2 * LANES : 0);
        row_ = arena.take<float>(padded_d_);
        other_ = arena.take<float>(padded_d_);
        gradient_ = arena.take<float>(padded_d_);
        unit_rows_ = arena.take<float>(LANES * padded_d_);
        staged_ = arena.take<float>(LANES * padded_d_);
    }

    // Calls play(i, j) for every pair of blocks, the blocks with themselves first.
    template <class Play>
    void tournament(Team* team, int64_t counter, Play play) {
        for (int64_t round = 0; round < players_; ++round) {
            const int64_t tables = round == 0 ? blocks_ : players_ / 2;
            for (int64_t table; (table = __atomic_fetch_add(counters_ + counter + round, 1,
                                                            __ATOMIC_RELAXED)) < tables;) {
                if (round == 0) {
                    play(table, table);
                    continue;
                }
                const int64_t others = players_ - 1;
                const int64_t i = table == 0 ? others : (round + table) % others;
                const int64_t j = (round + others - table) % others;
                if (i < blocks_ && j < blocks_) play(smaller(i, j), larger(i, j));
            }
            team_barrier(team);
        }
    }

    // Packs a block's rows as keys, as queries and as the right operand of the query sum.
    void prepare(int64_t block) {
        constexpr int64_t PANELS = BLOCK / Path::PANEL;
        for (int64_t p = block * PANELS; p < (block + 1) * PANELS && p * Path::PANEL < rows_; ++p)
            pack_keys<Path>(c_.features, c_.dtype, c_.row_scale, c_.normalize, p, keys_, row_);
        statistics_.at(block * BLOCK).reset(BLOCK);
        for (int64_t sub = block * SUBS; sub < (block + 1) * SUBS; ++sub) {
            prepare_queries(sub);
            if (!gradient_asked_) continue;
            const int64_t sums = Path::key_sum_rows(c_.d) * LANES;
            __builtin_memset(key_sums_ + sub * sums, 0, sums * sizeof(float));
            __builtin_memset(query_sums_ + sub * LANES * padded_d_, 0,
                             LANES * padded_d_ * sizeof(float));
        }
    }

    void prepare_queries(int64_t sub) {
        alignas(64) float one[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t i = sub * LANES + lane;
            const bool exists = i < rows_;
            if (!exists) keys_.scale[i] = 0.0f;
            for (int id = 0; id < rule_.n_ids; ++id)
                ids_[id * blocks_ * BLOCK + i] = exists ? rule_.query_ids[id][i] : 0;
            const float norm = keys_.scale[i], scale = *c_.scale * norm * LOG2E;
            query_scale_[i] = scale;
            one[lane] = 1.0f;
            const float* row = exists ? widen(c_.features, c_.dtype, i, c_.d, row_) : nullptr;
            const int64_t used = exists ? c_.d : 0;
            float* unit = unit_rows_ + lane * padded_d_;
            for (int64_t e = 0; e < used; ++e) unit[e] = row[e] * norm;
            __builtin_memset(unit + used, 0, (padded_d_ - used) * sizeof(float));
            float* staged = staged_ + lane * padded_d_;
            if (Path::BF16) {
                __builtin_memset(staged, 0, padded_d_ * sizeof(float));
                if (exists) __builtin_memcpy(staged, row_at(c_.features, c_.dtype, i), c_.d * 2);
            } else {
                for (int64_t e = 0; e < used; ++e) staged[e] = row[e] * scale;
                __builtin_memset(staged + used, 0, (padded_d_ - used) * sizeof(float));
            }
        }
        Path::pack_queries(staged_, padded_d_, c_.d, queries_ + sub * Path::depth(c_.d) * LANES);
        if (!gradient_asked_) return;
        for (int64_t column = 0; column < padded_d_; column += LANES)
            Path::pack_weighted(unit_rows_ + column, padded_d_, one, weighted(column, sub));
    }

    float* weighted(int64_t column, int64_t sub) const {
        return weighted_ + (column / LANES * blocks_ * SUBS + sub) * Path::WEIGHTED_FLOATS;
    }

    // Calls use(panel, logits) for each panel of a group's logits against one sub-block of queries,
    // exclusions applied, while the panel is in L1. Returns the group's rows. Without KEEP all
    // panels use one panel's memory.
    template <bool KEEP, class Use>
    int panels(int64_t sub, int64_t group, float* logits, Use use) const {
        const Block b = keys_.block(group);
        const int rows = static_cast<int>(round_up(b.keys, Path::PANEL));
        const float* packed = keys_.packed + Path::group_offset(group, c_.d);
        const float* queries = queries_ + sub * Path::depth(c_.d) * LANES;
        Block panel{};
        panel.query = sub * LANES;
        panel.queries = static_cast<int>(larger(0, smaller(LANES, rows_ - panel.query)));
        panel.rows = Path::PANEL;
        for (int row = 0; row < rows; row += Path::PANEL) {
            panel.key = b.key + row;
            panel.keys = static_cast<int>(smaller(Path::PANEL, b.keys - row));
            float* tile = logits + (KEEP ? row * LANES : 0);
            Path::logits(packed, queries, rows, row, c_.d, tile);
            if (Path::BF16)
                scale_logits(query_scale_ + panel.query, keys_.scale + panel.key, panel.rows, tile);
            exclude(rule_, ids_ + panel.query, blocks_ * BLOCK, panel, tile);
            if (panel.queries < LANES)
                fill_lanes(tile, panel.rows, panel.queries, -__builtin_inff());
            use(panel, tile);
        }
        return rows;
    }

    void collect(int64_t i, int64_t j) {
        for (int64_t group = j * GROUPS; group < (j + 1) * GROUPS && group < keys_.groups();
             ++group)
            for (int64_t sub = i * SUBS; sub < (i + 1) * SUBS; ++sub)
                panels<false>(sub, group, logits_, [&](const Block& panel, float* tile) {
                    alignas(64) float correction[LANES];
                    if (i != j) column_softmax(tile, panel.keys, statistics_.at(panel.key));
                    online_softmax<false>(tile, panel.rows, statistics_.at(panel.query),
                                          correction);
                });
    }

    // W is symmetric: W_ij = w_i exp(s_ij - lse_i) + w_j exp(s_ij - lse_j). A block with itself
    // holds both W_ij and W_ji, so there the key sum alone counts every pair once.
    void differentiate(int64_t i, int64_t j) {
        const int64_t sums = Path::key_sum_rows(c_.d) * LANES;
        for (int64_t group = j * GROUPS; group < (j + 1) * GROUPS && group < keys_.groups();
             ++group) {
            const int64_t key = group * GROUP;
            const float* packed = keys_.packed + Path::group_offset(group, c_.d);
            int rows = 0;
            for (int64_t s = 0; s < SUBS; ++s) {
                const int64_t sub = i * SUBS + s;
                float* logits = logits_ + s * GROUP * LANES;
                rows = panels<true>(sub, group, logits, [&](const Block& panel, float* tile) {
                    given_weights(tile, panel.rows,
                                  {lse_ + panel.query, weight_ + panel.query, lse_ + panel.key,
                                   weight_ + panel.key});
                });
                const float* weights = logits;
                if constexpr (Path::BF16) {
                    round_weights(logits, rows, keys_.scale + key, strip_ + s * GROUP * LANES,
                                  pairs_);
                    weights = pairs_;
                }
                Path::key_sum(packed, weights, rows, c_.d, key_sums_ + sub * sums);
            }
            if (i == j) continue;
            const typename Path::Weight* strip;
            if constexpr (Path::BF16)
                strip = strip_;
            else
                strip = logits_;
            for (int64_t column = 0; column < padded_d_; column += LANES)
                Path::query_sum(strip, weighted(column, i * SUBS), static_cast<int>(SUBS), rows,
                                query_sums_ + key * padded_d_ + column, padded_d_);
        }
    }

    int64_t partner(int64_t i) const { return i < c_.pairs ? i + c_.pairs : i - c_.pairs; }

    void finish_rows(int64_t block) {
        for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK; ++i) {
            lse_[i] = weight_[i] = 0.0f;
            if (i >= rows_) continue;
            if (c_.pass == Pass::backward) {
                const GivenRow row = given_row(c_.row_lse[i], c_.row_grad[i]);
                lse_[i] = row.lse;
                weight_[i] = row.grad;
                continue;
            }
            const float positive = c_.pass == Pass::loss ? positive_logit(i) : 0.0f;
            const RowTerms t = row_terms(statistics_.maximum[i], statistics_.reference[i],
                                         statistics_.sum[i], positive);
            c_.row_lse[i] = t.lse;
            c_.row_max[i] = t.maximum;
            if (c_.pass == Pass::forward) continue;
            c_.positive_logit[i] = positive;
            c_.loss[i] = t.loss;
            if (t.factor == 0.0f && t.lse == -__builtin_inff()) continue;
            lse_[i] = t.lse * LOG2E;
            weight_[i] = t.coefficient;
        }
    }

    float positive_logit(int64_t i) const {
        const float* z = widen(c_.features, c_.dtype, i, c_.d, row_);
        const float* p = widen(c_.features, c_.dtype, partner(i), c_.d, other_);
        return *c_.scale * keys_.scale[i] * keys_.scale[partner(i)] * dot(z, p, c_.d);
    }

    void finish_gradient(int64_t block) {
        const int64_t depth = Path::key_sum_rows(c_.d);
        for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK && i < rows_; ++i) {
            const float* key_sum = key_sums_ + i / LANES * depth * LANES + i % LANES;
            const float* query_sum = query_sums_ + i * padded_d_;
            for (int64_t e = 0; e < c_.d; ++e) gradient_[e] = key_sum[e * LANES] + query_sum[e];
            if (c_.pass == Pass::loss) subtract_positive(i);
            const float* z = widen(c_.features, c_.dtype, i, c_.d, row_);
            const float along =
                through_norm(z, gradient_, *c_.scale, keys_.scale[i], c_.normalize, c_.d, other_);
            // Each pair is counted in both of its rows.
            if (c_.grad_scale != nullptr) c_.grad_scale[i] = 0.5f * keys_.scale[i] * along;
            if (c_.moment != nullptr) c_.moment[i] = along;
            narrow(other_, c_.dtype, i, c_.d, c_.grad_features);
        }
    }

    void subtract_positive(int64_t i) {
        const int64_t j = partner(i);
        const float* p = widen(c_.features, c_.dtype, j, c_.d, other_);
        const float pull = (weight_[i] + weight_[j]) * keys_.scale[j];
        for (int64_t e = 0; e < c_.d; ++e) gradient_[e] -= pull * p[e];
    }

    const PairSoftmaxSymmetric& c_;
    const int64_t rows_, blocks_, players_, padded_d_;
    const bool gradient_asked_;
    Exclusion rule_;
    std::size_t bytes_;

    PackedKeys keys_;
    int* counters_;
    int64_t* ids_;  // [n_ids][rows, padded]
    float *queries_, *query_scale_;
    Statistics statistics_;
    float *lse_, *weight_;         // in units of log 2; d loss / d lse
    float* key_sums_;              // [sub-block][D][LANES]
    float* weighted_ = nullptr;    // [D / LANES][sub-block]
    float* query_sums_ = nullptr;  // [rows][D]

    float *logits_, *pairs_, *row_, *other_, *gradient_, *unit_rows_, *staged_;
    typename Path::Weight* strip_;
};

std::size_t workspace_bytes(const PairSoftmaxSymmetric& call) {
    return with_path(call.dtype, [&](auto path) {
        return SymmetricSweep<typename decltype(path)::type>(call, 0).bytes();
    });
}

void run(const PairSoftmaxSymmetric& call, Team* team) {
    with_path(call.dtype, [&](auto path) {
        using Path = typename decltype(path)::type;
        const PathScope<Path> scope;
        SymmetricSweep<Path>(call, team->rank).run(team);
    });
}

}  // namespace

extern const Kernels<PairSoftmaxSymmetric> SSL_FAST_TABLE(pair_softmax_symmetric);
const Kernels<PairSoftmaxSymmetric> SSL_FAST_TABLE(pair_softmax_symmetric) = {workspace_bytes, run};

}  // namespace ssl_fast
