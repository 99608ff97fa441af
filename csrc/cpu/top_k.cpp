// top_k on the CPU: the scores of nearest, and for each row a list of those above its threshold.
//
// The list is cut to its best entries when it is full, and the worst of these is the new
// threshold. Keys come in ascending order, so a later one of an equal score loses. The order of
// the result is that of distances from differences, computed for the entries that are left.

#include "cpu/accumulate.h"
#include "cpu/kernels.h"
#include "cpu/queries.h"
#include "cpu/select.h"

namespace ssl_fast {
namespace {

// Packed keys above this size are packed group by group where they are needed, again for each unit
// of rows: a bank of a million keys is not copied.
constexpr int64_t PACKED_BYTES = int64_t{64} << 20;
// Lists of one unit of rows.
constexpr int64_t LIST_BYTES = int64_t{4} << 20;

class TopKRun {
  public:
    TopKRun(const TopK& call, int rank)
        : c_(call),
          alone_(one_thread_each(call.b, call.threads)),
          in_place_(call.m * call.d * 4 > PACKED_BYTES),
          // Scores are rounded: a few more than k are kept until the distances are known.
          keep_(smaller(call.m, call.k + 8 + call.k / 8)),
          room_(smaller(call.m, larger(2 * keep_, keep_ + 64))) {
        unit_ = in_place_ ? MAX_UNIT : unit_blocks(c_.d);
        unit_ = larger(1, smaller(unit_, LIST_BYTES / (LANES * room_ * 8)));
        const int64_t groups = ceil_div(c_.n, LANES);
        unit_ = larger(1, smaller(unit_, groups / (alone_ ? 1 : 4 * c_.threads)));
        Arena arena(c_.workspace);
        counter_ = arena.take<int64_t>(1);
        if (!alone_) take_keys(arena);
        const std::size_t shared = arena.used();
        for (int r = 0; r <= rank; ++r) take_own(arena);
        bytes_ = shared + (arena.used() - shared) / (rank + 1) * c_.threads;
    }
    std::size_t bytes() const { return bytes_; }

    void run(Team* team) {
        if (team->rank == 0) *counter_ = 0;
        team_barrier(team);
        Tickets shared(counter_);
        if (!alone_) {
            int64_t base = 0;
            for (int64_t b = 0; b < c_.b; ++b) problem(b, team, shared, base);
            return;
        }
        Team self{0, 1, nullptr};
        while (shared.take(c_.b)) {
            int64_t counter = 0, base = 0;
            Tickets own(&counter);
            problem(shared.ticket(), &self, own, base);
        }
    }

  private:
    struct Block {
        Queries queries;
        alignas(64) float threshold[LANES];  // NaN lets everything pass
        int64_t count[LANES];
        Entry* list;  // [LANES][room]
    };

    void take_keys(Arena& arena) { take_centroids(arena, in_place_ ? 0 : c_.m, c_.d, keys_); }
    void take_own(Arena& arena) {
        if (alone_) take_keys(arena);
        for (int64_t s = 0; s < unit_; ++s) {
            block_[s] = arena.take<Block>(1);
            packed_[s] = arena.take<float>(query_depth(c_.d) * LANES);
            lists_[s] = arena.take<Entry>(LANES * room_);
        }
        if (in_place_) take_centroids(arena, group_keys(), c_.d, group_);
        staged_ = arena.take<float>(LANES * STAGE);
        tile_ = arena.take<float>(32 * LANES);
        x_row_ = arena.take<float>(round_up(c_.d, 64));
        y_row_ = arena.take<float>(round_up(c_.d, 64));
    }

    // Of the path with the larger groups.
    int64_t group_keys() const {
        const int64_t depth = smaller(c_.d, round_up(c_.d, 32) / 2);
        return larger(1, GROUP_BYTES / 4 / (MIN_PANEL * depth) + 1) * 32;
    }

    void problem(int64_t b, Team* team, Tickets& tickets, int64_t& base) {
        keys_.k = c_.m;
        keys_.rows = matrix(c_.y, c_.dtype, b);
        keys_.given = c_.y_scale == nullptr ? nullptr : c_.y_scale + b * c_.m;
        if (in_place_)
            choose_anchor(keys_, c_.dtype, team, x_row_);
        else
            pack_centroids(keys_, c_.dtype, team, x_row_, y_row_);
#if defined(__AVX512BF16__)
        if (keys_.bf16) {
            const PathScope<Bf16Path> scope;
            units<Bf16Path>(b, tickets, base);
        } else
#endif
            units<FloatPath>(b, tickets, base);
        // The next problem's keys take the place of these.
        team_barrier(team);
    }

    template <class Path>
    void units(int64_t b, Tickets& tickets, int64_t& base) {
        const int64_t unit = unit_ * LANES, count = ceil_div(c_.n, unit);
        while (tickets.take(base + count)) {
            const int64_t first = (tickets.ticket() - base) * unit;
            search<Path>(b, first, smaller(first + unit, c_.n));
        }
        base += count;
    }

    template <class Path>
    void search(int64_t b, int64_t first, int64_t end) {
        const Rows x = matrix(c_.x, c_.dtype, b);
        const float* x_scale = c_.x_scale == nullptr ? nullptr : c_.x_scale + b * c_.n;
        const int64_t blocks = ceil_div(end - first, LANES);
        for (int64_t s = 0; s < blocks; ++s) {
            Block& block = *block_[s];
            const int64_t row = first + s * LANES;
            const int count = static_cast<int>(smaller(LANES, end - row));
            block.queries.packed = packed_[s];
            block.list = lists_[s];
            pack_queries<Path>(x, c_.dtype, x_scale, {row, nullptr, count}, keys_, staged_,
                               block.queries);
            for (int lane = 0; lane < LANES; ++lane) {
                block.threshold[lane] = lane < count ? __builtin_nanf("") : __builtin_inff();
                block.count[lane] = 0;
            }
        }
        const bool scaled = Path::BF16 && (x_scale != nullptr || keys_.given != nullptr);
        const int64_t step = group_panels<Path>(c_.d) * Path::PANEL;
        for (int64_t key = 0; key < c_.m; key += step) {
            const Centroids group = keys_from<Path>(key, smaller(step, c_.m - key));
            for (int64_t s = 0; s < blocks; ++s)
                for (int64_t k = 0; k < group.k; k += Path::PANEL) {
                    const int rows = static_cast<int>(smaller(Path::PANEL, group.k - k));
                    panel_products<Path>(group, k / Path::PANEL, rows, packed_[s], tile_);
                    if (scaled)
                        collect<true>(group, k, rows, key, *block_[s]);
                    else
                        collect<false>(group, k, rows, key, *block_[s]);
                }
        }
        for (int64_t row = first; row < end; ++row) {
            const int64_t at = row - first;
            finish(b, x, x_scale, row, static_cast<int>(at % LANES), *block_[at / LANES]);
        }
    }

    // `count` keys from a whole panel on.
    template <class Path>
    Centroids keys_from(int64_t key, int64_t count) {
        Centroids part = keys_;
        part.k = count;
        part.rows.data = row_at(keys_.rows, c_.dtype, key);
        if (part.given != nullptr) part.given += key;
        if (in_place_) {
            part.packed = group_.packed;
            part.half = group_.half;
            part.scale = group_.scale;
            part.index = group_.index;
            part.panel_norm = group_.panel_norm;
            part.panel_prefix = group_.panel_prefix;
            for (int64_t panel = 0; panel < ceil_div(count, Path::PANEL); ++panel)
                pack_panel<Path>(part, c_.dtype, panel, x_row_, y_row_);
        } else {
            part.packed += key / Path::PANEL * panel_floats<Path>(c_.d);
            part.half += key;
            part.scale += key;
            part.index += key;
        }
        return part;
    }

    template <bool SCALED>
    void collect(const Centroids& group, int64_t k, int rows, int64_t key, Block& block) const {
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < LANES; v += WIDTH) {
                const Vec s = score<SCALED>(group, k, r, v, tile_, block.queries);
                unsigned lanes = lanes_above(s, load(block.threshold + v));
                if (lanes == 0) continue;
                alignas(64) float scores[WIDTH];
                store(scores, s);
                for (; lanes != 0; lanes &= lanes - 1) {
                    const int lane = __builtin_ctz(lanes);
                    insert(scores[lane], static_cast<int32_t>(key + k + r), v + lane, block);
                }
            }
    }

    void insert(float score, int32_t index, int lane, Block& block) const {
        Entry* list = block.list + lane * room_;
        float& threshold = block.threshold[lane];
        int64_t& count = block.count[lane];
        if (count == room_) {
            select<HigherKey>(list, count, keep_);
            count = keep_;
            threshold = list[0].key;
            for (int64_t e = 1; e < keep_; ++e)
                threshold = list[e].key < threshold ? list[e].key : threshold;
        }
        // What is not a number comes last, and of those the lowest indices first.
        if (score != score) score = -__builtin_inff();
        if (score <= threshold) return;
        list[count++] = {score, index};
    }

    void finish(int64_t b, const Rows& x, const float* x_scale, int64_t row, int lane,
                Block& block) const {
        Entry* list = block.list + lane * room_;
        if (block.count[lane] > keep_) select<HigherKey>(list, block.count[lane], keep_);
        const float* u = widen(x, c_.dtype, row, c_.d, x_row_);
        const float scale = x_scale == nullptr ? 1.0f : x_scale[row];
        for (int64_t e = 0; e < keep_; ++e) {
            const int64_t j = list[e].index;
            list[e].key = squared_distance(u, scale, widen(keys_.rows, c_.dtype, j, c_.d, y_row_),
                                           keys_.scale_of(j), c_.d);
        }
        sort<LowerKey>(list, keep_);
        const int64_t at = (b * c_.n + row) * c_.k;
        for (int64_t e = 0; e < c_.k; ++e) {
            c_.distances[at + e] = list[e].key;
            c_.indices[at + e] = list[e].index;
        }
    }

    const TopK& c_;
    const bool alone_, in_place_;
    const int64_t keep_, room_;
    int64_t unit_;
    std::size_t bytes_;
    int64_t* counter_;
    Centroids keys_, group_;
    Block* block_[MAX_UNIT];
    float* packed_[MAX_UNIT];
    Entry* lists_[MAX_UNIT];
    float *staged_, *tile_, *x_row_, *y_row_;
};

std::size_t workspace_bytes(const TopK& call) {
    TopK unplaced = call;
    unplaced.workspace = nullptr;
    return TopKRun(unplaced, 0).bytes();
}

void run(const TopK& call, Team* team) { TopKRun(call, team->rank).run(team); }

}  // namespace

extern const Kernels<TopK> SSL_FAST_TABLE(top_k);
const Kernels<TopK> SSL_FAST_TABLE(top_k) = {workspace_bytes, run};

}  // namespace ssl_fast
