// What all kernels share on the host: the device they run on, the words for what it reports, and
// the last step of a sum.

#include "core/cuda.h"
#include "cuda/launch.cuh"

namespace ssl_fast {
namespace cuda {
namespace {

constexpr int THREADS = 512;

// One block: partial sums are 8 bytes for every 24 KB that a pass reads and writes.
__global__ void __launch_bounds__(THREADS)
    finish_kernel(const double* partials, std::int64_t count, double factor, float* value) {
    double total = 0.0;
    for (std::int64_t i = threadIdx.x; i < count; i += THREADS) total += partials[i];
    total = block_sum<THREADS>(total);
    if (threadIdx.x == 0) *value = static_cast<float>(factor * total);
}

}  // namespace

cudaError_t finish(const double* partials, std::int64_t count, double factor, float* value,
                   cudaStream_t stream) {
    return launch(&finish_kernel, 1, THREADS, stream, partials, count, factor, value);
}

const char* message_of(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int use(int device) {
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    // Fails where the driver is older than the runtime, or no image here is for this device.
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&finish_kernel));
}

}  // namespace cuda
}  // namespace ssl_fast
