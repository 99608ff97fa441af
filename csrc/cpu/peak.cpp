// The machine's ceiling: multiply-adds on registers, nothing else. Benchmarks divide by it.

#include "core/isa.h"
#include "cpu/kernels.h"

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

}  // namespace

extern const PeakKernels SSL_FAST_TABLE(peak);
const PeakKernels SSL_FAST_TABLE(peak) = {peak_fp32, peak_bf16};

}  // namespace ssl_fast
