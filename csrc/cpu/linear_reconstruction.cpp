// linear_reconstruction on the CPU: loss and gradients of a linear layer's output in one sweep.

#include "cpu/linear_sweep.h"

namespace ssl_fast {
namespace {

std::size_t workspace_bytes(const LinearReconstruction& call) {
    LinearReconstruction unplaced = call;
    unplaced.workspace = nullptr;
    return with_path(call.dtype, [&](auto path) {
        return LinearSweep<typename decltype(path)::type>(unplaced, 0).bytes();
    });
}

void run(const LinearReconstruction& call, Team* team) {
    with_path(call.dtype, [&](auto path) {
        using Path = typename decltype(path)::type;
        const PathScope<Path> scope;
        LinearSweep<Path>(call, team->rank).run(team);
    });
}

}  // namespace

extern const Kernels<LinearReconstruction> SSL_FAST_TABLE(linear_reconstruction);
const Kernels<LinearReconstruction> SSL_FAST_TABLE(linear_reconstruction) = {workspace_bytes, run};

}  // namespace ssl_fast
