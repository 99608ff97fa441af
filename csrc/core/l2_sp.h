#pragma once
// The signature of l2_sp: how far many tensors are from where they began.

#include "core/pair_softmax.h"

namespace ssl_fast {

// value = weight / 2 * sum |parameter - anchor|^2, and weight * (parameter - anchor) for each.
struct L2Sp {
    Dtype dtype;
    std::int64_t count;              // tensors
    const std::int64_t* sizes;       // [count] elements of each
    const std::int64_t* parameters;  // [count] addresses, as all below
    const std::int64_t* anchors;     // [count]
    const std::int64_t* grads;       // [count] or null; 0: this one gets no gradient
    bool add;                        // to what the gradients hold
    double weight;
    const float* grad_value;  // [] or null: 1; a factor of the gradients
    float* value;             // [] or null
    int threads;
    void* workspace;
};

}  // namespace ssl_fast
