// l2_sp: one pass over many tensors, whose addresses travel as the kernel's arguments. A table in
// memory would need a copy from the host, which a CUDA graph would repeat after the table has gone.

#include "core/cuda.h"
#include "core/l2_sp.h"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"

namespace ssl_fast {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int UNROLL = 4;
// A kernel has 4 KB of arguments: 64 tensors are 2.6 KB, and 161 of a ResNet-50 three launches.
constexpr int MOST_TENSORS = 64;

template <class T>
constexpr int TILE = THREADS * UNROLL * WIDTH<T>;

struct Tensors {
    int count;
    const void* parameters[MOST_TENSORS];
    const void* anchors[MOST_TENSORS];
    void* grads[MOST_TENSORS];  // null: this one gets no gradient
    std::int64_t sizes[MOST_TENSORS];
    std::int64_t first_block[MOST_TENSORS + 1];
};

// The tensor that a block of the grid belongs to: the last that begins at it or before. Tensors
// without elements have no block, and begin where the next one does.
__device__ inline int tensor_of(const Tensors& tensors, std::int64_t block) {
    int low = 0, high = tensors.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (tensors.first_block[middle] <= block)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

template <class T>
__device__ double whole_tile(const T* parameter, const T* anchor, T* grad, float step, bool add) {
    constexpr int W = WIDTH<T>;
    Pack<T, W> xs[UNROLL], as[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const int place = (u * THREADS + threadIdx.x) * W;
        xs[u] = load<T, W>(parameter + place);
        as[u] = load<T, W>(anchor + place);
    }
    double total = 0.0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const int place = (u * THREADS + threadIdx.x) * W;
        Pack<T, W> held{};
        if (add) held = load<T, W>(grad + place);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < W; ++i) {
            const float away = widen(xs[u].values[i]) - widen(as[u].values[i]);
            sum = fmaf(away, away, sum);
            held.values[i] = narrow<T>(fmaf(step, away, widen(held.values[i])));
        }
        total += sum;
        if (grad != nullptr) store<T, W>(grad + place, held);
    }
    return total;
}

template <class T>
__device__ double any_tile(const T* parameter, const T* anchor, T* grad, float step, bool add,
                           std::int64_t size) {
    double total = 0.0;
    for (int place = threadIdx.x; place < TILE<T> && place < size; place += THREADS) {
        const float away = widen(parameter[place]) - widen(anchor[place]);
        total += away * away;
        const float held = add ? widen(grad[place]) : 0.0f;
        if (grad != nullptr) grad[place] = narrow<T>(fmaf(step, away, held));
    }
    return total;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    distance_kernel(Tensors tensors, bool add, float weight,
                    const float* grad_value,  // [] or null: 1
                    double* partials) {       // [blocks] or null
    const int tensor = tensor_of(tensors, blockIdx.x);
    const std::int64_t begin = (blockIdx.x - tensors.first_block[tensor]) * TILE<T>;
    const std::int64_t size = tensors.sizes[tensor] - begin;
    const T* parameter = static_cast<const T*>(tensors.parameters[tensor]) + begin;
    const T* anchor = static_cast<const T*>(tensors.anchors[tensor]) + begin;
    T* grad = static_cast<T*>(tensors.grads[tensor]);
    if (grad != nullptr) grad += begin;
    add = add && grad != nullptr;
    const float step = grad_value == nullptr ? weight : weight * *grad_value;
    const bool packed = size >= TILE<T> && aligned(parameter) && aligned(anchor) && aligned(grad);
    const double total = packed ? whole_tile(parameter, anchor, grad, step, add)
                                : any_tile(parameter, anchor, grad, step, add, size);
    if (partials == nullptr) return;
    const double sum = block_sum<THREADS>(total);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <class T>
std::int64_t all_blocks(const L2Sp& call) {
    std::int64_t blocks = 0;
    for (std::int64_t i = 0; i < call.count; ++i) blocks += divided_up(call.sizes[i], TILE<T>);
    return blocks;
}

template <class P>
P address(const std::int64_t* addresses, std::int64_t i) {
    return addresses == nullptr ? nullptr : reinterpret_cast<P>(addresses[i]);
}

template <class T>
cudaError_t run_all(const L2Sp& call, cudaStream_t stream) {
    auto* partials = call.value == nullptr ? nullptr : static_cast<double*>(call.workspace);
    std::int64_t done = 0;
    for (std::int64_t first = 0; first < call.count; first += MOST_TENSORS) {
        Tensors tensors{};
        const std::int64_t left = call.count - first;
        tensors.count = static_cast<int>(left < MOST_TENSORS ? left : MOST_TENSORS);
        for (int i = 0; i < tensors.count; ++i) {
            tensors.parameters[i] = address<const void*>(call.parameters, first + i);
            tensors.anchors[i] = address<const void*>(call.anchors, first + i);
            tensors.grads[i] = address<void*>(call.grads, first + i);
            tensors.sizes[i] = call.sizes[first + i];
            tensors.first_block[i + 1] =
                tensors.first_block[i] + divided_up(tensors.sizes[i], TILE<T>);
        }
        const std::int64_t blocks = tensors.first_block[tensors.count];
        const cudaError_t error = launch(&distance_kernel<T>, blocks, THREADS, stream, tensors,
                                         call.add, static_cast<float>(call.weight), call.grad_value,
                                         partials == nullptr ? nullptr : partials + done);
        if (error != cudaSuccess) return error;
        done += blocks;
    }
    // Where no tensor has an element, the workspace is null and the value 0.
    if (call.value == nullptr) return cudaSuccess;
    return finish(partials, done, 0.5 * call.weight, call.value, stream);
}

}  // namespace

std::size_t workspace_bytes(const L2Sp& call) {
    return with_element(
        call.dtype,
        [&](auto zero) {
            return static_cast<std::size_t>(all_blocks<decltype(zero)>(call)) * sizeof(double);
        },
        std::size_t{0});
}

int run(const L2Sp& call, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    return with_element(
        call.dtype, [&](auto zero) { return run_all<decltype(zero)>(call, on); },
        cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace ssl_fast
