#pragma once
// Launches on the caller's stream, and sums in a fixed order.

#include <cuda_runtime.h>

#include <cstdint>

namespace ssl_fast {
namespace cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

constexpr std::int64_t divided_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// Nothing is launched for no blocks. A grid's first dimension holds 2^31 - 1.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads,
                   cudaStream_t stream, Arguments... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// The sum over a block of THREADS, in thread 0. Called once by a kernel.
template <int THREADS>
__device__ double block_sum(double value) {
    static_assert(THREADS % WARP == 0 && THREADS <= WARP * WARP,
                  "whole warps, and one of them adds");
    constexpr int WARPS = THREADS / WARP;
    __shared__ double of_warps[WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int step = WARP / 2; step > 0; step /= 2)
        value += __shfl_down_sync(ALL_LANES, value, step);
    if (lane == 0) of_warps[warp] = value;
    __syncthreads();
    if (warp != 0) return 0.0;
    value = lane < WARPS ? of_warps[lane] : 0.0;
    for (int step = WARP / 2; step > 0; step /= 2)
        value += __shfl_down_sync(ALL_LANES, value, step);
    return value;
}

// value = factor * the sum of what the blocks of a kernel found.
cudaError_t finish(const double* partials,  // [count]
                   std::int64_t count, double factor,
                   float* value,  // []
                   cudaStream_t stream);

}  // namespace cuda
}  // namespace ssl_fast
