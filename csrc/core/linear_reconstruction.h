#pragma once
// The signature of linear_reconstruction: an elementwise loss between a linear layer's output and a
// target, and its gradients, without the output.

#include "core/pair_softmax.h"
#include "core/pointwise.h"

namespace ssl_fast {

// What a target's elements are; the first three are the Dtypes.
enum class Element : int { float32 = 0, bfloat16 = 1, float16 = 2, uint8 = 3 };

// loss_nd = w_nd * f(x_nd, t_nd), x = input linear_weight^T + bias, t = target * scale + shift,
// w = row_weight_n * element_weight_nd; 0 where a row or an element isn't kept, whatever it holds.
// An output that is null is not asked for and costs nothing.
struct LinearReconstruction {
    Dtype dtype;
    std::int64_t n, h, d;
    Rows input;          // [N, H]
    Rows linear_weight;  // [D, H]
    const float* bias;   // [D] or null

    Kind kind;  // bce is bce_with_logits whose targets are checked
    float parameter;
    const float* pos_weight;  // [D] or null
    Element target_element;
    Rows target;  // [N, D]
    float target_scale, target_shift;
    const float* row_weight;       // [N] or null
    const std::uint8_t* row_kept;  // [N] or null
    Rows element_weight;           // [N, D] fp32 or null
    Rows element_kept;             // [N, D] bytes or null

    float* loss;            // []: the sum
    float* losses;          // [N, D] or null
    float* grad_input;      // [N, H] or null: gradients of the sum, all fp32
    float* grad_weight;     // [D, H] or null
    float* grad_bias;       // [D] or null
    std::int64_t* outside;  // []: 1 where a target that counts is not in [0, 1], for bce

    int threads;
    void* workspace;
};

}  // namespace ssl_fast
