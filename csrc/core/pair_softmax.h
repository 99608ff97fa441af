#pragma once
// The signatures of pair_softmax: pointers, sizes and strides, no tensors. Every pointer is the
// caller's; an output that is null is not asked for and costs nothing.

#include <cstddef>
#include <cstdint>

namespace ssl_fast {

struct Team;

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int MAX_DIAGONALS = 4;

// A matrix with contiguous rows; the stride counts elements.
struct Rows {
    const void* data;
    std::int64_t stride;
};

// Which pairs (i, j) leave the softmax: j - i in diagonals, or equal ids.
struct Exclusion {
    int n_diagonals;
    std::int64_t diagonals[MAX_DIAGONALS];
    const std::int64_t* query_ids;  // [N] or null
    const std::int64_t* key_ids;    // [M] or null
};

enum class Pass : int {
    forward,   // statistics of the rows
    loss,      // statistics, loss, and the gradients that are asked for
    backward,  // gradients from given statistics and weights
};

struct PairSoftmax {
    Pass pass;
    Dtype dtype;
    std::int64_t n, m, d;
    Rows query;     // [N, D]
    Rows key;       // [M, D]
    Rows positive;  // [N, D]; null: the positive of row i is key i
    Exclusion exclusion;

    // s_ij = query_scale_i * key_scale_j * <q_i, k_j>. In the loss pass both come from `scale` and,
    // with `normalize`, from the rows' norms.
    const float* query_scale;  // [N]
    const float* key_scale;    // [M]
    const float* scale;        // [1]
    bool normalize;

    float* row_lse;         // [N]; the backward pass reads it
    float* row_max;         // [N]
    float* loss;            // [N]
    float* positive_logit;  // [N]

    const float* row_grad;    // [N]
    const float* column_lse;  // [M] or null
    const float* column_grad;

    void* grad_query;         // [N, D] contiguous, in dtype
    void* grad_key;           // [M, D]
    void* grad_positive;      // [N, D]
    float* grad_scale;        // [N]
    float* grad_query_scale;  // [N]
    float* grad_key_scale;    // [M]

    int threads;
    void* workspace;  // 64-byte aligned, of workspace_bytes
};

// features [2N, D]: rows i and i + N are each other's positive.
struct PairSoftmaxSymmetric {
    Dtype dtype;
    std::int64_t pairs, d;
    Rows features;
    const float* scale;  // [1]
    bool normalize;
    float* row_lse;         // [2N]
    float* row_max;         // [2N]
    float* loss;            // [2N]
    float* positive_logit;  // [2N]
    void* grad_features;    // [2N, D]
    float* grad_scale;      // [2N]
    int threads;
    void* workspace;
};

// One table per ISA. `run` is called by every member of a team.
template <class Call>
struct Kernels {
    std::size_t (*workspace_bytes)(const Call&);
    void (*run)(const Call&, Team*);
};

}  // namespace ssl_fast
