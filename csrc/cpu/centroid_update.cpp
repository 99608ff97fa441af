// centroid_update on the CPU: the sums of lloyd from labels that are given.

#include "core/clustering.h"
#include "cpu/accumulate.h"
#include "cpu/kernels.h"

namespace ssl_fast {
namespace {

class Update {
  public:
    Update(const CentroidUpdate& call, int rank)
        : c_(call), alone_(one_thread_each(call.b, call.threads)) {
        Arena arena(c_.workspace);
        counter_ = arena.take<int64_t>(1);
        const std::size_t shared = arena.used();
        for (int r = 0; r <= rank; ++r) order_ = take_order(arena, block(), c_.n, c_.k);
        bytes_ = shared + (arena.used() - shared) / (rank + 1) * c_.threads;
    }
    std::size_t bytes() const { return bytes_; }

    void run(Team* team) {
        if (!alone_) {
            for (int64_t b = 0; b < c_.b; ++b) problem(b, *team);
            return;
        }
        if (team->rank == 0) *counter_ = 0;
        team_barrier(team);
        Tickets tickets(counter_);
        while (tickets.take(c_.b)) problem(tickets.ticket(), {0, 1, nullptr});
    }

  private:
    int64_t block() const { return rows_in_cache(c_.k, c_.d, c_.dtype); }

    void problem(int64_t b, const Team& team) {
        const Rows x = matrix(c_.x, c_.dtype, b);
        const Clusters clusters =
            clusters_of(b, c_.n, c_.k, c_.d, c_.labels, c_.x_scale, c_.weight, c_.sums, c_.counts);
        int64_t largest = -1;
        for (int64_t first = 0; first < c_.n; first += block()) {
            const int64_t end = smaller(first + block(), c_.n);
            largest = larger(largest, accumulate(x, c_.dtype, clusters, first, end, team, order_));
        }
        if (team.rank == 0 && c_.largest != nullptr) c_.largest[b] = largest;
    }

    const CentroidUpdate& c_;
    const bool alone_;
    std::size_t bytes_;
    int64_t* counter_;
    RowOrder order_;
};

std::size_t workspace_bytes(const CentroidUpdate& call) {
    CentroidUpdate unplaced = call;
    unplaced.workspace = nullptr;
    return Update(unplaced, 0).bytes();
}

void run(const CentroidUpdate& call, Team* team) { Update(call, team->rank).run(team); }

}  // namespace

extern const Kernels<CentroidUpdate> SSL_FAST_TABLE(centroid_update);
const Kernels<CentroidUpdate> SSL_FAST_TABLE(centroid_update) = {workspace_bytes, run};

}  // namespace ssl_fast
