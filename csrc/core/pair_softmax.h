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

// A row with this id leaves the softmax with all its pairs.
constexpr std::int64_t IGNORED_ID = INT64_MIN;
constexpr int MAX_IDS = 2;

// Which pairs (i, j) leave the softmax: j - i in diagonals, an id in common (with `matching`: none
// in common), or an id that is IGNORED_ID.
struct Exclusion {
    int n_diagonals;
    std::int64_t diagonals[MAX_DIAGONALS];
    int n_ids;  // that a row has
    bool matching;
    const std::int64_t* query_ids[MAX_IDS];  // [N] each
    const std::int64_t* key_ids[MAX_IDS];    // [M] each
};

enum class Pass : int {
    forward,   // statistics of the rows, and of the columns or the expectation when asked for
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

    float* row_lse;     // [N]; the backward pass reads it
    float* row_max;     // [N]
    float* column_lse;  // [M] or null; the backward pass reads it
    float*
        diagonal_logit;  // [N] or null: s_ij at j = i + diagonals[0], untouched where there is none
    float* expectation;  // [N, D] or null: the mean of key_scale_j k_j under a row's softmax
    float* loss;         // [N]
    float* positive_logit;  // [N]

    const float* row_grad;       // [N]
    const float* column_grad;    // [M], with column_lse
    const float* diagonal_grad;  // [N] or null: the weight at j = i + diagonals[0]

    void* grad_query;         // [N, D] contiguous, in dtype
    void* grad_key;           // [M, D]
    void* grad_positive;      // [N, D]
    float* grad_scale;        // [N]
    float* grad_query_scale;  // [N]
    float* grad_key_scale;    // [M]

    int threads;
    void* workspace;  // 64-byte aligned, of workspace_bytes
};

// The softmax of a symmetric matrix: s_ij = scale * row_scale_i * row_scale_j * <x_i, x_j>, j != i,
// less the pairs of rows `pairs` apart. In the loss pass these are each other's positive.
struct PairSoftmaxSymmetric {
    Pass pass;
    Dtype dtype;
    std::int64_t n, d;
    std::int64_t pairs;      // N / 2, or 0: no pair but i == j leaves
    Rows features;           // [N, D]
    const float* scale;      // [1]
    const float* row_scale;  // [N]; null in the loss pass: 1, or with `normalize` the inverse norms
    bool normalize;
    Exclusion exclusion;    // by ids; the diagonals are the kernel's own
    float* row_lse;         // [N]; the backward pass reads it
    float* row_max;         // [N]
    float* loss;            // [N]
    float* positive_logit;  // [N]
    const float* row_grad;  // [N]
    void* grad_features;    // [N, D]
    float* grad_scale;      // [N]
    float* moment;          // [N]: sum_j (W_ij + W_ji) row_scale_j <x_i, x_j>
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
