#pragma once
// The signature of pair_sigmoid. It is the sweep of pair_softmax with another epilogue:
// s_ij = query_scale_i * key_scale_j * <q_i, k_j> + bias, loss_i = sum_j softplus(s_ij), where the
// pair on diagonals[0], the positive, counts softplus(-s_ij).

#include "core/pair_softmax.h"

namespace ssl_fast {

// `pass` is forward without gradients and backward with them; `exclusion` holds the positive's
// diagonal and nothing else.
struct PairSigmoid : PairSoftmax {
    const float* bias;        // [1]
    const float* row_weight;  // [N] or null: 1
    float* grad_bias;         // [N]
};

}  // namespace ssl_fast
