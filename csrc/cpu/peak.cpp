// The machine's ceilings: multiply-adds on registers and streams through memory, nothing else.
// Benchmarks divide by them.

#include "core/isa.h"
#include "cpu/kernels.h"
#include "cpu/passes.h"

namespace ssl_fast {
namespace {

// 10 chains hide a latency of 4 at two per cycle, and fit 16 registers.
constexpr int CHAINS = 10;

template <class Step>
double chains(long rounds, double operations_per_lane) {
    Vec sum[CHAINS];
    Vec a = broadcast(0.0f), b = broadcast(0.0f);
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) sum[c] = keep_in_register(broadcast(0.0f));
    for (long round = 0; round < rounds; ++round) {
        // New values as far as the compiler knows, so that the chains are not merged.
        a = keep_in_register(a);
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; ++c) sum[c] = keep_in_register(Step::apply(a, b, sum[c]));
    }
    Vec total = broadcast(0.0f);
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) total = total + sum[c];
    return static_cast<double>(rounds) * CHAINS * WIDTH * operations_per_lane + sum_lanes(total);
}

double peak_fp32(long rounds) { return chains<FloatStep>(rounds, 2.0); }

#if defined(__AMX_BF16__)
double peak_bf16(long rounds) {
    const MatrixUnit unit;
    for (long round = 0; round < rounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return static_cast<double>(rounds) * 4 * 16 * 16 * 32 * 2;
}
#elif defined(__AVX512BF16__)
double peak_bf16(long rounds) { return chains<Bf16Step>(rounds, 4.0); }
#else
constexpr double (*peak_bf16)(long) = nullptr;
#endif

// Two arrays read, one written. The threads take turns at blocks, so that what is left at the end
// is small; each block is a stream to the prefetcher, helped over the ends of pages.
void stream(const float* a, const float* b, float* to, int64_t n, Team* team) {
    constexpr int64_t BLOCK = 131072, AHEAD = 1024;
    for (int64_t first = team->rank * BLOCK; first < n; first += team->size * BLOCK) {
        const int64_t end = smaller(first + BLOCK, n);
        int64_t i = first;
        for (; i + WIDTH <= end; i += WIDTH) {
            __builtin_prefetch(a + i + AHEAD, 0, 3);
            __builtin_prefetch(b + i + AHEAD, 0, 3);
            store_past(to + i, load(a + i) + load(b + i));
        }
        for (; i < end; ++i) to[i] = a[i] + b[i];
    }
    finish_stores();
}

}  // namespace

extern const PeakKernels SSL_FAST_TABLE(peak);
const PeakKernels SSL_FAST_TABLE(peak) = {peak_fp32, peak_bf16, stream};

}  // namespace ssl_fast
