// reconstruction: one pass over memory, then one block that adds what the others found.

#include "core/cuda.h"
#include "core/reconstruction.h"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/pointwise.cuh"

namespace ssl_fast {
namespace cuda {
namespace {

constexpr int THREADS = 256;
// Accesses in flight per thread and array. A multiprocessor runs 1024 threads of 64 registers,
// which ask for 64 KB at once; an H200's bandwidth times its latency is some 40 KB for each.
constexpr int UNROLL = 2;

// Elements of a block. The sizes alone cut the work, so the same bits come from every card.
template <class T>
constexpr int TILE = THREADS * UNROLL * WIDTH<T>;

__device__ inline std::int64_t divided(std::int64_t place, std::int64_t by) {
    // 64-bit division takes some 70 instructions, 32-bit one 20.
    if (place <= UINT32_MAX && by <= UINT32_MAX)
        return static_cast<std::uint32_t>(place) / static_cast<std::uint32_t>(by);
    return place / by;
}

// The weighted losses of W elements, summed; `xs` become grad_factor times their derivatives.
template <Kind KIND, int W>
__device__ float elements(const Reconstruction& call, std::int64_t place, float (&xs)[W],
                          const float (&ts)[W]) {
    // What a call may have beside them is looked for once for all W.
    float weights[W], positive[W], losses[W];
    unsigned kept = ~0u;
    for (int i = 0; i < W; ++i) weights[i] = positive[i] = 1.0f;
    if (call.weight != nullptr)
        for (int i = 0; i < W; ++i) weights[i] = call.weight[place + i];
    if (KIND == Kind::bce_with_logits && call.pos_weight != nullptr) {
        std::int64_t at = place - divided(place, call.period) * call.period;
        for (int i = 0; i < W; ++i) {
            positive[i] = call.pos_weight[at];
            at = at + 1 == call.period ? 0 : at + 1;
        }
    }
    if (call.mask != nullptr) {
        std::int64_t at = divided(place, call.mask_span), step = place - at * call.mask_span;
        kept = 0;
        for (int i = 0; i < W; ++i) {
            kept |= (call.mask[at] != 0 ? 1u : 0u) << i;
            if (++step == call.mask_span) {
                step = 0;
                ++at;
            }
        }
    }
    float sum = 0.0f;
    for (int i = 0; i < W; ++i) {
        const float t = fmaf(ts[i], call.target_scale, call.target_shift);
        const Terms found = terms<KIND>(xs[i], t, positive[i], call.parameter);
        // What is left out takes no part, whatever it holds.
        const bool keep = (kept >> i & 1u) != 0;
        losses[i] = keep ? found.loss * weights[i] : 0.0f;
        xs[i] = keep ? found.slope * weights[i] * call.grad_factor : 0.0f;
        sum += losses[i];
    }
    if (call.losses != nullptr)
        for (int i = 0; i < W; ++i) call.losses[place + i] = losses[i];
    return sum;
}

template <class T, class Target, Kind KIND>
__device__ double whole_tile(const Reconstruction& call, std::int64_t begin) {
    constexpr int W = WIDTH<T>;
    const T* input = static_cast<const T*>(call.input);
    const Target* target = static_cast<const Target*>(call.target);
    const std::int64_t first = begin + threadIdx.x * W;
    Pack<T, W> xs[UNROLL];
    Pack<Target, W> ts[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        xs[u] = load<T, W>(input + first + u * THREADS * W);
        ts[u] = load<Target, W>(target + first + u * THREADS * W);
    }
    double total = 0.0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const std::int64_t place = first + u * THREADS * W;
        float wide_xs[W], wide_ts[W];
        for (int i = 0; i < W; ++i) {
            wide_xs[i] = widen(xs[u].values[i]);
            wide_ts[i] = widen(ts[u].values[i]);
        }
        total += elements<KIND>(call, place, wide_xs, wide_ts);
        if (call.grad == nullptr) continue;
        for (int i = 0; i < W; ++i) xs[u].values[i] = narrow<T>(wide_xs[i]);
        store<T, W>(static_cast<T*>(call.grad) + place, xs[u]);
    }
    return total;
}

// The last tile, and all of arrays that don't begin at a multiple of 16 bytes.
template <class T, class Target, Kind KIND>
__device__ double any_tile(const Reconstruction& call, std::int64_t begin) {
    const std::int64_t end = begin + TILE<T> < call.n ? begin + TILE<T> : call.n;
    double total = 0.0;
    for (std::int64_t place = begin + threadIdx.x; place < end; place += THREADS) {
        float x[1] = {widen(static_cast<const T*>(call.input)[place])};
        const float t[1] = {widen(static_cast<const Target*>(call.target)[place])};
        total += elements<KIND>(call, place, x, t);
        if (call.grad != nullptr) static_cast<T*>(call.grad)[place] = narrow<T>(x[0]);
    }
    return total;
}

template <class T, class Target, Kind KIND>
__global__ void __launch_bounds__(THREADS, 4)
    reconstruction_kernel(Reconstruction call, double* partials, bool packed) {
    const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * TILE<T>;
    const double total = packed && begin + TILE<T> <= call.n
                             ? whole_tile<T, Target, KIND>(call, begin)
                             : any_tile<T, Target, KIND>(call, begin);
    if (call.value == nullptr) return;
    const double sum = block_sum<THREADS>(total);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <class T, class Target, Kind KIND>
cudaError_t run(const Reconstruction& call, cudaStream_t stream) {
    const bool packed = aligned(call.input) && aligned(call.target) && aligned(call.grad);
    auto* partials = static_cast<double*>(call.workspace);
    const std::int64_t blocks = divided_up(call.n, TILE<T>);
    const cudaError_t error = launch(&reconstruction_kernel<T, Target, KIND>, blocks, THREADS,
                                     stream, call, partials, packed);
    if (error != cudaSuccess || call.value == nullptr) return error;
    return finish(partials, blocks, call.factor, call.value, stream);
}

template <class T, class Target>
cudaError_t run_kind(const Reconstruction& call, cudaStream_t stream) {
    switch (call.kind) {
        case Kind::mse: return run<T, Target, Kind::mse>(call, stream);
        case Kind::l1: return run<T, Target, Kind::l1>(call, stream);
        case Kind::smooth_l1: return run<T, Target, Kind::smooth_l1>(call, stream);
        case Kind::huber: return run<T, Target, Kind::huber>(call, stream);
        case Kind::bce: return run<T, Target, Kind::bce>(call, stream);
        case Kind::bce_with_logits: return run<T, Target, Kind::bce_with_logits>(call, stream);
    }
    return cudaErrorInvalidValue;
}

// Targets are bytes, of the input's dtype, or fp32.
template <class T>
cudaError_t run_target(const Reconstruction& call, cudaStream_t stream) {
    if (call.bytes) return run_kind<T, std::uint8_t>(call, stream);
    if (call.target_dtype == Dtype::float32) return run_kind<T, float>(call, stream);
    if (call.target_dtype == call.dtype) return run_kind<T, T>(call, stream);
    return cudaErrorInvalidValue;
}

}  // namespace

std::size_t workspace_bytes(const Reconstruction& call) {
    return with_element(
        call.dtype,
        [&](auto zero) {
            return static_cast<std::size_t>(divided_up(call.n, TILE<decltype(zero)>)) *
                   sizeof(double);
        },
        std::size_t{0});
}

int run(const Reconstruction& call, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    return with_element(
        call.dtype, [&](auto zero) { return run_target<decltype(zero)>(call, on); },
        cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace ssl_fast
