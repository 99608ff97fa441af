#pragma once
// Numbers as they lie in memory, in groups that one instruction moves, and as they are computed
// with.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/pair_softmax.h"

namespace ssl_fast {
namespace cuda {

// The widest access of a thread, and how many numbers it moves.
constexpr int ACCESS_BYTES = 16;
template <class T>
constexpr int WIDTH = ACCESS_BYTES / static_cast<int>(sizeof(T));

template <class T, int W>
struct alignas(sizeof(T) * W < ACCESS_BYTES ? sizeof(T) * W : ACCESS_BYTES) Pack {
    T values[W];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(std::uint8_t x) { return static_cast<float>(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
    return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
    return __float2half_rn(x);
}

template <class T, int W>
__device__ Pack<T, W> load(const T* from) {
    return *reinterpret_cast<const Pack<T, W>*>(from);
}
template <class T, int W>
__device__ void store(T* to, const Pack<T, W>& pack) {
    *reinterpret_cast<Pack<T, W>*>(to) = pack;
}

// What run gives for a number of the dtype; `otherwise` for no dtype.
template <class Run, class Result>
Result with_element(Dtype dtype, Run run, Result otherwise) {
    switch (dtype) {
        case Dtype::float32: return run(float{});
        case Dtype::bfloat16: return run(__nv_bfloat16{});
        case Dtype::float16: return run(__half{});
    }
    return otherwise;
}

// Null is aligned: what isn't there is not accessed.
__host__ __device__ inline bool aligned(const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % ACCESS_BYTES == 0;
}

}  // namespace cuda
}  // namespace ssl_fast
