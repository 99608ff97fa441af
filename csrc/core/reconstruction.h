#pragma once
// The signature of reconstruction: elementwise losses, their sum and its gradient in one pass.

#include "core/pair_softmax.h"
#include "core/pointwise.h"

namespace ssl_fast {

struct Reconstruction {
    Kind kind;
    Dtype dtype, target_dtype;
    bool bytes;  // the target is uint8, whatever target_dtype
    std::int64_t n;
    const void* input;   // [N]
    const void* target;  // [N], read as target_scale t + target_shift
    float target_scale, target_shift;
    float parameter;           // smooth_l1's beta, huber's delta
    const float* weight;       // [N] or null: 1
    const std::uint8_t* mask;  // [N / mask_span] or null; elements with 0 are left out
    std::int64_t mask_span;
    const float* pos_weight;  // [period] or null; element i has that of i % period
    std::int64_t period;
    double factor;      // of the value
    float grad_factor;  // of the gradient

    float* value;           // [] or null: factor * the sum of weight * loss
    float* losses;          // [N] or null: weight * loss
    void* grad;             // [N] or null, in the input's dtype; it may be the input
    std::int64_t* outside;  // [] or null: elements that bce takes no logarithm of, which are
                            // outside [0, 1] or NaN
    int threads;
    void* workspace;
};

}  // namespace ssl_fast
