// nearest and lloyd on the CPU: labels by rows and, with sums, each block of rows again by columns
// while it is in cache.

#include "cpu/accumulate.h"
#include "cpu/nearest_rows.h"

namespace ssl_fast {
namespace {

class NearestRun {
  public:
    NearestRun(const Nearest& call, int rank)
        : c_(call), alone_(one_thread_each(call.b, call.threads)), rows_(call) {
        Arena arena(c_.workspace);
        counter_ = arena.take<int64_t>(1);
        if (!alone_) take_problem(arena);
        const std::size_t shared = arena.used();
        for (int r = 0; r <= rank; ++r) take_own(arena);
        bytes_ = shared + (arena.used() - shared) / (rank + 1) * c_.threads;
    }
    std::size_t bytes() const { return bytes_; }

    void run(Team* team) {
        if (team->rank == 0) *counter_ = 0;
        team_barrier(team);
        rows_.begin();
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
    void take_problem(Arena& arena) {
        take_centroids(arena, c_.k, c_.d, centroids_, screens(c_.k, c_.d));
        take_projection(arena, PrunedRows::prunes(c_) ? c_.columns : 0, c_.k, c_.d, projection_);
    }
    void take_own(Arena& arena) {
        if (alone_) take_problem(arena);
        rows_.take(arena);
        buffer_ = arena.take<float>(round_up(c_.d, 64));
        values_ = arena.take<float>(round_up(c_.d, 64));
        if (c_.sums != nullptr)
            order_ = take_order(arena, block_rows() + MAX_UNIT * LANES * c_.threads, c_.n, c_.k);
    }
    int64_t block_rows() const {
        const int64_t busy = 2 * LANES * (alone_ ? 1 : c_.threads);
        return larger(busy, rows_in_cache(c_.k, c_.d, c_.dtype));
    }

    void problem(int64_t b, Team* team, Tickets& tickets, int64_t& base) {
        centroids_.rows = matrix(c_.centroids, c_.dtype, b);
        centroids_.given = c_.centroid_scale == nullptr ? nullptr : c_.centroid_scale + b * c_.k;
        pack_centroids(centroids_, c_.dtype, team, buffer_, values_);
        const int64_t given = c_.lengths == nullptr ? c_.n : c_.lengths[b];
        const int64_t length = smaller(larger(given, 0), c_.n);
        if (team->rank == 0)
            for (int64_t i = length; i < c_.n; ++i) {
                c_.labels[b * c_.n + i] = -1;
                if (c_.distances != nullptr) c_.distances[b * c_.n + i] = 0.0f;
            }
#if defined(__AVX512BF16__)
        if (centroids_.bf16) {
            const PathScope<Bf16Path> scope;
            blocks<Bf16Path>(b, length, team, tickets, base);
        } else
#endif
        {
#if defined(__AVX512BF16__)
            if (centroids_.rounded != nullptr)
                pack_screen(centroids_, c_.dtype, team, buffer_, values_);
#endif
            if (projection_.columns() > 0)
                rows_.pack_projection(projection_, centroids_, team, buffer_, values_);
            blocks<FloatPath>(b, length, team, tickets, base);
        }
        // The next problem's centroids take the place of these.
        team_barrier(team);
    }

    template <class Path>
    void blocks(int64_t b, int64_t length, Team* team, Tickets& tickets, int64_t& base) {
        const Problem p{matrix(c_.x, c_.dtype, b),
                        c_.x_scale == nullptr ? nullptr : c_.x_scale + b * c_.n,
                        c_.previous == nullptr ? nullptr : c_.previous + b * c_.n,
                        &projection_,
                        c_.labels + b * c_.n,
                        c_.distances == nullptr ? nullptr : c_.distances + b * c_.n};
        const bool sums = c_.sums != nullptr;
        const int64_t unit = rows_.unit(ceil_div(length, LANES), team->size) * LANES;
        // Each member of the team gets the same number of units of a block.
        const int64_t block = sums ? round_up(block_rows(), unit * team->size) : larger(1, length);
        for (int64_t first = 0; first < length; first += block) {
            const int64_t end = smaller(first + block, length);
            const int64_t units = ceil_div(end - first, unit);
            while (tickets.take(base + units)) {
                const int64_t row = first + (tickets.ticket() - base) * unit;
                const int64_t next = smaller(row + team->size * unit, length);
                rows_.assign<Path>(p, centroids_, row, smaller(row + unit, end),
                                   {p.x, c_.dtype, next, smaller(next + unit, length), c_.d});
            }
            base += units;
            rows_.resolve<Path>(p, centroids_);
            if (!sums) continue;
            team_barrier(team);
            accumulate(p.x, c_.dtype,
                       clusters_of(b, c_.n, c_.k, c_.d, c_.labels, c_.x_scale, c_.weight, c_.sums,
                                   c_.counts),
                       first, end, *team, order_);
        }
    }

    const Nearest& c_;
    const bool alone_;
    std::size_t bytes_;
    int64_t* counter_;
    Centroids centroids_;
    Projection projection_;
    NearestRows rows_;
    RowOrder order_{};
    float *buffer_, *values_;
};

std::size_t workspace_bytes(const Nearest& call) {
    Nearest unplaced = call;
    unplaced.workspace = nullptr;
    return NearestRun(unplaced, 0).bytes();
}

void run(const Nearest& call, Team* team) { NearestRun(call, team->rank).run(team); }

}  // namespace

extern const Kernels<Nearest> SSL_FAST_TABLE(nearest);
const Kernels<Nearest> SSL_FAST_TABLE(nearest) = {workspace_bytes, run};

}  // namespace ssl_fast
