#pragma once
// CUDA's language, and what csrc/cuda uses of its runtime, on the CPU: the threads of a block are
// fibers that take turns wherever they wait for each other. Every other launch runs its blocks and
// threads backwards, so that a result that needs an order, or a barrier that isn't there, differs.
// A block whose threads wait for each other in vain aborts.

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned x) : x(x) {}
};
inline dim3 threadIdx, blockIdx;

enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};
struct cudaFuncAttributes {};
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess             ? "no error"
           : error == cudaErrorInvalidValue ? "invalid argument"
                                            : "invalid configuration";
}
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}

namespace emulated {

constexpr unsigned WARP = 32;
constexpr std::size_t STACK = 64 << 10;

// Threads that meet: whoever comes last opens it for all.
struct Gate {
    unsigned members = 0, arrived = 0;
    unsigned long opened = 0;
    void open() {
        arrived = 0;
        ++opened;
    }
};
struct Warp {
    Gate gate;
    alignas(16) char slots[WARP][16];
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done = false;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Warp> warps;
inline Gate block_gate;
inline ucontext_t scheduler;
inline unsigned current;
inline unsigned long steps;  // gates opened and threads ended
inline void (*body)(void*);
inline void* body_context;

inline void wait(Gate& gate) {
    if (++gate.arrived >= gate.members) {
        gate.open();
        ++steps;
        return;
    }
    const unsigned long before = gate.opened;
    while (gate.opened == before) swapcontext(&fibers[current]->context, &scheduler);
}
inline void leave(Gate& gate) {
    --gate.members;
    if (gate.members > 0 && gate.arrived >= gate.members) gate.open();
}
inline void enter() {
    body(body_context);
    fibers[current]->done = true;
    ++steps;
    leave(warps[current / WARP].gate);
    leave(block_gate);
    swapcontext(&fibers[current]->context, &scheduler);
}

inline void run_block(unsigned threads, bool backwards) {
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    warps.assign((threads + WARP - 1) / WARP, Warp{});
    block_gate = Gate{threads};
    for (unsigned i = 0; i < threads; ++i) {
        ++warps[i / WARP].gate.members;
        Fiber& fiber = *fibers[i];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (unsigned left = threads; left > 0;) {
        const unsigned long before = steps;
        for (unsigned i = 0; i < threads; ++i) {
            current = backwards ? threads - 1 - i : i;
            if (fibers[current]->done) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &fibers[current]->context);
            left -= fibers[current]->done;
        }
        if (steps == before) {
            std::fprintf(stderr, "%u threads of block %u wait for each other in vain\n", left,
                         blockIdx.x);
            std::abort();
        }
    }
}

// Runs a function of (slots of the warp, own lane) between two meetings of the warp.
template <class T, class Read>
auto exchange(T value, Read read) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    const unsigned mine = threadIdx.x;
    Warp& warp = warps[mine / WARP];
    std::memcpy(warp.slots[mine % WARP], &value, sizeof(T));
    wait(warp.gate);
    threadIdx.x = mine;
    const auto of = [&](unsigned lane) {
        T other;
        std::memcpy(&other, warp.slots[lane], sizeof(T));
        return other;
    };
    const auto found = read(of, mine % WARP);
    wait(warp.gate);
    threadIdx.x = mine;
    return found;
}

}  // namespace emulated

inline void __syncthreads() {
    const unsigned mine = threadIdx.x;
    emulated::wait(emulated::block_gate);
    threadIdx.x = mine;
}
inline void __syncwarp() {
    const unsigned mine = threadIdx.x;
    emulated::wait(emulated::warps[mine / emulated::WARP].gate);
    threadIdx.x = mine;
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned step) {
    return emulated::exchange(value, [&](auto of, unsigned lane) {
        return of(lane + step < emulated::WARP ? lane + step : lane);
    });
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
    return emulated::exchange(
        value, [&](auto of, unsigned lane) { return of(lane >= step ? lane - step : lane); });
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned from) {
    return emulated::exchange(value, [&](auto of, unsigned) { return of(from); });
}
template <class T>
unsigned __match_any_sync(unsigned, T value) {
    return emulated::exchange(value, [&](auto of, unsigned) {
        unsigned alike = 0;
        for (unsigned lane = 0; lane < emulated::WARP; ++lane)
            if (of(lane) == value) alike |= 1u << lane;
        return alike;
    });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* to, int value) {
    const int before = *to;
    *to += value;
    return before;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    static bool backwards = false;
    backwards = !backwards;
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    } call{kernel, {std::forward<Arguments>(arguments)...}};
    static_assert(sizeof(call.arguments) <= 4096, "a kernel has 4 KB of arguments");
    emulated::body_context = &call;
    emulated::body = [](void* context) {
        auto* call = static_cast<Call*>(context);
        std::apply(call->kernel, call->arguments);
    };
    const unsigned blocks = config->gridDim.x;
    for (unsigned i = 0; i < blocks; ++i) {
        blockIdx.x = backwards ? blocks - 1 - i : i;
        emulated::run_block(config->blockDim.x, backwards);
    }
    emulated::body_context = nullptr;
    return cudaSuccess;
}
