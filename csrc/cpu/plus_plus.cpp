// plus_plus on the CPU: which rows each candidate is closer to than all that is chosen, in one
// sweep over the rows; the choices then need nothing but these pairs.
//
// A pair is looked at in full where a bound from the sweep's product lets it be closer. After the
// first few centroids hardly any is: a candidate has few rows around it.

#include "cpu/accumulate.h"
#include "cpu/kernels.h"
#include "cpu/screen.h"

namespace ssl_fast {
namespace {

// Blocks of LANES rows whose pairs are put in the order of the candidates together, and how many
// pairs they may have: 1.5 MB.
constexpr int64_t BLOCKS = 8, UNIT_PAIRS = int64_t{1} << 17;

#if defined(__AVX512BF16__)
inline bool rounds(int64_t d) { return d >= SCREEN_COLUMNS; }
#else
inline bool rounds(int64_t) { return false; }
#endif

struct Pair {
    int32_t row;
    float distance;
};

// The pairs of a problem: those of unit u and candidate t are
// [base[u] + begin[u (T + 1) + t], base[u] + begin[u (T + 1) + t + 1]), in the order of the rows.
struct Pairs {
    Pair* pair;      // [room]
    int64_t* base;   // [units]
    int32_t* begin;  // [units, T + 1]
    double* gain;    // [units, each]: by how much the first candidates lower the potential
    int64_t* found;  // []: more than room where some were left out
};

class PlusPlusRun {
  public:
    PlusPlusRun(const PlusPlus& call, int rank)
        : c_(call),
          alone_(one_thread_each(call.b, call.threads)),
          rounds_(rounds(call.d)),
          unit_(LANES * larger(1, smaller(smaller(BLOCKS, call.n / (16 * LANES)),
                                          UNIT_PAIRS / (LANES * call.t)))) {
        Arena arena(c_.workspace);
        counter_ = arena.take<int64_t>(1);
        if (!alone_) take_problem(arena);
        const std::size_t shared = arena.used();
        for (int r = 0; r <= rank; ++r) {
            if (alone_) take_problem(arena);
            take_own(arena);
        }
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
    struct Found {
        int32_t candidate;
        Pair pair;
    };
    struct Problem {
        Rows x;
        const float *x_scale, *weight;
        float* closest;
        const int64_t* drawn;
        const double* limits;
        int64_t length;
    };

    void take_problem(Arena& arena) {
        take_centroids(arena, c_.t, c_.d, candidates_, rounds_);
        const int64_t units = ceil_div(c_.n, unit_), rows = round_up(c_.t, MIN_PANEL * 4);
        far_ = arena.take<float>(rounds_ ? 0 : rows);
        raised_ = arena.take<float>(rounds_ ? 0 : rows);
        pairs_ = {arena.take<Pair>(c_.room), arena.take<int64_t>(units),
                  arena.take<int32_t>(units * (c_.t + 1)), arena.take<double>(units * c_.each),
                  arena.take<int64_t>(1)};
        gains_ = arena.take<double>(c_.each);
        refused_ = arena.take<char>(c_.t);
    }
    void take_own(Arena& arena) {
        found_ = arena.take<Found>(unit_ * c_.t);
        count_ = arena.take<int32_t>(c_.t + 2);
        tried_ = arena.take<int64_t>(c_.each);
        staged_ = arena.take<float>(LANES * STAGE);
        tile_ = arena.take<float>(32 * LANES);
        wide_ = arena.take<float>(query_depth(c_.d) * LANES);
        packed_ = arena.take<float>(query_depth(c_.d) * LANES);
        queries_ = arena.take<Queries>(1);
        x_row_ = arena.take<float>(round_up(c_.d, 64));
        v_row_ = arena.take<float>(round_up(c_.d, 64));
#if defined(__AVX512BF16__)
        screened_ = arena.take<Screened>(1);
#endif
    }

    void problem(int64_t b, Team* team, Tickets& tickets, int64_t& base) {
        const int64_t given = c_.lengths == nullptr ? c_.n : c_.lengths[b];
        const Problem p{matrix(c_.x, c_.dtype, b),
                        c_.x_scale == nullptr ? nullptr : c_.x_scale + b * c_.n,
                        c_.weight == nullptr ? nullptr : c_.weight + b * c_.n,
                        c_.closest + b * c_.n,
                        c_.drawn + b * c_.t,
                        c_.limits + b * c_.t,
                        smaller(larger(given, 0), c_.n)};
        int64_t* chosen = c_.chosen + b * (c_.t / c_.each);
        if (team->rank == 0) {
            *pairs_.found = 0;
            __builtin_memset(refused_, 0, c_.t);
            for (int64_t i = 0; i < c_.t / c_.each; ++i) chosen[i] = -1;
        }
        if (c_.wanted[b] < 1 || p.length == 0) return;
        pack(b, team);
        const int64_t units = ceil_div(p.length, unit_);
        sweep(p, units, team, tickets, base);
        team_barrier(team);
        if (*pairs_.found <= c_.room)
            choose(p, units, smaller(c_.wanted[b], c_.t / c_.each), team, chosen);
        else
            choose_first(p, units, team, chosen);
        // The next problem's pairs take the place of these.
        team_barrier(team);
    }

    void pack(int64_t b, Team* team) {
        Centroids& c = candidates_;
        c.rows = matrix(c_.candidates, c_.dtype, b);
        c.given = c_.candidate_scale == nullptr ? nullptr : c_.candidate_scale + b * c_.t;
        choose_anchor(c, c_.dtype, team, x_row_);
        c.bf16 = false;
        pack_panels<FloatPath>(c, c_.dtype, *team, x_row_, v_row_);
        team_barrier(team);
#if defined(__AVX512BF16__)
        if (rounds_) {
            pack_screen(c, c_.dtype, team, x_row_, v_row_);
            return;
        }
#endif
        // A chain of d multiply-adds errs by d eps |u| |v| at most.
        const float chain = 6.1e-8f * static_cast<float>(c.d + 16);
        for (int64_t k = team->rank; k < c.k; k += team->size) {
            far_[k] = chain * __builtin_sqrtf(2.0f * c.half[k]) + 1e-37f * static_cast<float>(c.d);
            raised_[k] = c.half[k] * (1.0f - 1e-6f);
        }
        team_barrier(team);
    }

    void sweep(const Problem& p, int64_t units, Team* team, Tickets& tickets, int64_t& base) {
#if defined(__AVX512BF16__)
        if (rounds_) {
            const PathScope<Bf16Path> scope;
            take_units<true>(p, units, team, tickets, base);
            return;
        }
#endif
        take_units<false>(p, units, team, tickets, base);
    }

    template <bool ROUNDED>
    void take_units(const Problem& p, int64_t units, Team* team, Tickets& tickets, int64_t& base) {
        while (tickets.take(base + units)) {
            const int64_t unit = tickets.ticket() - base, first = unit * unit_;
            const int64_t end = smaller(first + unit_, p.length);
            const int64_t next = smaller(first + team->size * unit_, p.length);
            Ahead ahead(p.x, c_.dtype, next, smaller(next + unit_, p.length), c_.d);
            int64_t found = 0;
            for (int64_t row = first; row < end; row += LANES)
                block<ROUNDED>(p, row, smaller(LANES, end - row), ahead, found);
            sort(p, unit, found);
        }
        base += units;
    }

    // The pairs of up to LANES rows.
    template <bool ROUNDED>
    void block(const Problem& p, int64_t first, int64_t rows, Ahead& ahead, int64_t& found) {
        const Centroids& c = candidates_;
        const Selection selection{first, nullptr, static_cast<int>(rows)};
        alignas(64) float reach[LANES], square[LANES], limit[LANES];
        const float* packed = packed_;
        if constexpr (ROUNDED) {
#if defined(__AVX512BF16__)
            alignas(64) float scale[LANES];
            screened_->packed = packed_;
            load_queries<FloatPath>(p.x, c_.dtype, p.x_scale, selection, c.d, staged_, wide_,
                                    scale);
            if (p.x_scale == nullptr && !c.anchored)
                round_queries<true>(c, wide_, scale, *screened_);
            else
                round_queries<false>(c, wide_, scale, *screened_);
            __builtin_memcpy(reach, screened_->reach, sizeof reach);
            __builtin_memcpy(square, screened_->square, sizeof square);
#endif
        } else {
            queries_->packed = packed_;
            pack_queries<FloatPath>(p.x, c_.dtype, p.x_scale, selection, c, staged_, *queries_);
            __builtin_memcpy(square, queries_->square, sizeof square);
            for (int lane = 0; lane < LANES; ++lane) reach[lane] = __builtin_sqrtf(square[lane]);
        }
        // |u - v|^2 < closest means that u.v - |v|^2 / 2 > (|u|^2 - closest) / 2.
        const float slack = 6.1e-8f * static_cast<float>(c.d + 16);
        for (int lane = 0; lane < LANES; ++lane) {
            const float near = lane < rows ? p.closest[first + lane] : 0.0f;
            limit[lane] = lane < rows ? 0.5f * (square[lane] - near) - slack * (square[lane] + near)
                                      : __builtin_inff();
        }
        const float* far = ROUNDED ? c.reach : far_;
        const float* raised = ROUNDED ? c.raised : raised_;
        constexpr int64_t PANEL = ROUNDED ? 32 : FloatPath::PANEL;
        const int64_t lines = ceil_div(ahead.lines(), ceil_div(c.k, PANEL) * BLOCKS);
        for (int64_t k = 0; k < c.k; k += PANEL) {
            const int height = static_cast<int>(smaller(PANEL, c.k - k));
            ahead.fetch(lines);
            if constexpr (ROUNDED) {
#if defined(__AVX512BF16__)
                screen_products(c, k / PANEL, height, packed, tile_);
#endif
            } else {
                panel_products<FloatPath>(c, k / PANEL, height, packed, tile_);
            }
            for (int r = 0; r < height; ++r) {
                const Vec most = broadcast(far[k + r]), half = broadcast(raised[k + r]);
                for (int v = 0; v < LANES; v += WIDTH) {
                    const Vec bound =
                        fma(load(reach + v), most, load(tile_ + r * LANES + v) - half);
                    unsigned lanes = lanes_above(bound, load(limit + v));
                    for (; lanes != 0; lanes &= lanes - 1)
                        look(p, first, v + __builtin_ctz(lanes), rows, k + r, found);
                }
            }
        }
    }

    void look(const Problem& p, int64_t first, int64_t lane, int64_t rows, int64_t t,
              int64_t& found) {
        if (lane >= rows) return;
        const int64_t i = first + lane;
        const float distance = distance_of(p, i, t);
        if (distance < p.closest[i])
            found_[found++] = {static_cast<int32_t>(t), {static_cast<int32_t>(i), distance}};
    }
    float distance_of(const Problem& p, int64_t i, int64_t t) {
        return squared_distance(
            widen(p.x, c_.dtype, i, c_.d, x_row_), p.x_scale == nullptr ? 1.0f : p.x_scale[i],
            widen(candidates_.rows, c_.dtype, t, c_.d, v_row_), candidates_.scale_of(t), c_.d);
    }
    static double gain_of(const Problem& p, const Pair& pair) {
        const float gain = p.closest[pair.row] - pair.distance;
        if (!(gain > 0.0f)) return 0.0;
        return p.weight == nullptr ? gain : static_cast<double>(gain) * p.weight[pair.row];
    }

    // What was found of a unit into its place, by candidate.
    void sort(const Problem& p, int64_t unit, int64_t found) {
        double* gain = pairs_.gain + unit * c_.each;
        for (int64_t t = 0; t < c_.each; ++t) gain[t] = 0.0;
        __builtin_memset(count_, 0, (c_.t + 2) * sizeof(int32_t));
        for (int64_t f = 0; f < found; ++f) {
            const Found& one = found_[f];
            ++count_[one.candidate + 2];
            if (one.candidate < c_.each) gain[one.candidate] += gain_of(p, one.pair);
        }
        for (int64_t t = 2; t <= c_.t; ++t) count_[t] += count_[t - 1];
        const int64_t base = __atomic_fetch_add(pairs_.found, found, __ATOMIC_RELAXED);
        if (base + found > c_.room) return;
        pairs_.base[unit] = base;
        for (int64_t f = 0; f < found; ++f)
            pairs_.pair[base + count_[found_[f].candidate + 1]++] = found_[f].pair;
        // Each candidate's place has moved from its begin to its end, which is the next one's
        // begin.
        __builtin_memcpy(pairs_.begin + unit * (c_.t + 1), count_, (c_.t + 1) * sizeof(int32_t));
    }

    template <class Body>
    void for_pairs(int64_t units, int64_t t, Body body) const {
        for (int64_t u = 0; u < units; ++u) {
            const int32_t* begin = pairs_.begin + u * (c_.t + 1) + t;
            const Pair* pair = pairs_.pair + pairs_.base[u];
            for (int32_t i = begin[0]; i < begin[1]; ++i) body(pair[i]);
        }
    }

    // Every member of the team takes the same decisions; the first writes them down.
    void choose(const Problem& p, int64_t units, int64_t wanted, Team* team, int64_t* chosen) {
        for (int64_t made = 0; made < wanted; ++made) {
            int64_t count = 0;
            for (int64_t t = 0; t < c_.t && count < c_.each; ++t)
                if (!refused_[t] && p.limits[t] <= static_cast<double>(p.closest[p.drawn[t]]))
                    tried_[count++] = t;
            if (count < c_.each) return;
            for (int64_t j = team->rank; j < c_.each; j += team->size) {
                double gain = 0.0;
                for_pairs(units, tried_[j], [&](const Pair& pair) { gain += gain_of(p, pair); });
                gains_[j] = gain;
            }
            team_barrier(team);
            const int64_t best = tried_[best_of(gains_)];
            if (team->rank == 0) {
                for_pairs(units, best, [&](const Pair& pair) {
                    float& near = p.closest[pair.row];
                    near = pair.distance < near ? pair.distance : near;
                });
                p.closest[p.drawn[best]] = 0.0f;
                for (int64_t j = 0; j < c_.each; ++j) refused_[tried_[j]] = 1;
                chosen[made] = p.drawn[best];
            }
            team_barrier(team);
        }
    }
    int64_t best_of(const double* gains) const {
        int64_t best = 0;
        for (int64_t j = 1; j < c_.each; ++j)
            if (gains[j] > gains[best]) best = j;
        return best;
    }

    // The first choice, where the pairs have no room: from the units' gains.
    void choose_first(const Problem& p, int64_t units, Team* team, int64_t* chosen) {
        if (team->rank == 0) {
            for (int64_t t = 0; t < c_.each; ++t) {
                gains_[t] = 0.0;
                for (int64_t u = 0; u < units; ++u) gains_[t] += pairs_.gain[u * c_.each + t];
            }
        }
        team_barrier(team);
        const int64_t best = best_of(gains_);
        const int64_t share = ceil_div(p.length, team->size), first = team->rank * share;
        for (int64_t i = first; i < smaller(first + share, p.length); ++i) {
            const float distance = distance_of(p, i, best);
            if (distance < p.closest[i]) p.closest[i] = distance;
        }
        team_barrier(team);
        if (team->rank != 0) return;
        p.closest[p.drawn[best]] = 0.0f;
        chosen[0] = p.drawn[best];
    }

    const PlusPlus& c_;
    const bool alone_, rounds_;
    const int64_t unit_;
    std::size_t bytes_;
    int64_t* counter_;
    Centroids candidates_;
    Pairs pairs_;
    float *far_, *raised_;  // as Centroids::reach and raised, of fp32 products
    double* gains_;         // [each]
    char* refused_;         // [T]
    Found* found_;          // [unit, T]
    int32_t* count_;
    int64_t* tried_;  // [each]
    float *staged_, *tile_, *wide_, *packed_, *x_row_, *v_row_;
    Queries* queries_;
#if defined(__AVX512BF16__)
    Screened* screened_;
#endif
};

std::size_t workspace_bytes(const PlusPlus& call) {
    PlusPlus unplaced = call;
    unplaced.workspace = nullptr;
    return PlusPlusRun(unplaced, 0).bytes();
}

void run(const PlusPlus& call, Team* team) { PlusPlusRun(call, team->rank).run(team); }

}  // namespace

extern const Kernels<PlusPlus> SSL_FAST_TABLE(plus_plus);
const Kernels<PlusPlus> SSL_FAST_TABLE(plus_plus) = {workspace_bytes, run};

}  // namespace ssl_fast
