#pragma once
// The signature of kl_divergence, of a diagonal normal distribution from the standard one.

#include "core/pair_softmax.h"

namespace ssl_fast {

// -1/2 sum(1 + logvar - mu^2 - exp(logvar)), where exp stops at the largest finite number.
struct KlDivergence {
    Dtype dtype;
    std::int64_t n;
    const void* mu;      // [N]
    const void* logvar;  // [N]
    float* value;        // []
    float* grad_logvar;  // [N] or null: (exp(logvar) - 1) / 2; the gradient of mu is mu
    int threads;
    void* workspace;
};

}  // namespace ssl_fast
