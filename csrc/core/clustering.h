#pragma once
// The signatures of nearest, lloyd, centroid_update, top_k and plus_plus. All have a leading batch
// of B independent problems. u_i = x_scale_i x_i and v_k = centroid_scale_k c_k, scales of null
// being 1.

#include "core/pair_softmax.h"

namespace ssl_fast {

// B matrices with contiguous rows; strides count elements.
struct Batch {
    const void* data;
    std::int64_t batch_stride, row_stride;
};

// labels = argmin_k |u_i - v_k|^2, ties to the lowest k; with sums, one pass of Lloyd's algorithm.
struct Nearest {
    Dtype dtype;
    std::int64_t b, n, k, d;
    Batch x;                      // [B, N, D]
    Batch centroids;              // [B, K, D]
    const float* x_scale;         // [B, N] or null
    const float* centroid_scale;  // [B, K] or null
    const float* weight;          // [B, N] or null: 1
    const std::int64_t* lengths;  // [B] or null: N. Rows from there on get label -1, distance 0
    // For speed alone: what was nearest to the rows before, and how many columns of the centroids'
    // leading directions may rule others out, 1 to K.
    const std::int64_t* previous;  // [B, N] or null
    std::int64_t columns;
    std::int64_t* labels;  // [B, N]
    float* distances;      // [B, N] or null: |u_i - v_label|^2
    double* sums;          // [B, K, D] or null; zeroed by the caller, as counts
    double* counts;        // [B, K] or null
    int threads;
    void* workspace;
};

// sums_k = sum of weight_i u_i over label_i = k, in the order of the rows.
struct CentroidUpdate {
    Dtype dtype;
    std::int64_t b, n, k, d;
    Batch x;                     // [B, N, D]
    const std::int64_t* labels;  // [B, N]; a negative one takes no part
    const float* x_scale;        // [B, N] or null
    const float* weight;         // [B, N] or null: 1
    double* sums;                // [B, K, D], zeroed by the caller, as counts
    double* counts;              // [B, K]
    std::int64_t* largest;       // [B] or null: the largest label; those >= K are left out
    int threads;
    void* workspace;
};

// The k nearest of M rows, ascending by (distance, index).
struct TopK {
    Dtype dtype;
    std::int64_t b, n, m, d, k;
    Batch x;               // [B, N, D]
    Batch y;               // [B, M, D]
    const float* x_scale;  // [B, N] or null
    const float* y_scale;  // [B, M] or null
    float* distances;      // [B, N, k]
    std::int64_t* indices;
    int threads;
    void* workspace;
};

// Greedy k-means++ among rows that were drawn by their closest distances: again and again the first
// `each` candidates whose row's closest distance is still at least their limit are compared, and
// the one that lowers sum(weight * closest) most is chosen, until too few are left.
struct PlusPlus {
    Dtype dtype;
    std::int64_t b, n, t, d;
    std::int64_t each;             // candidates for each choice, at most T
    std::int64_t room;             // pairs of a row and a closer candidate that are kept; of more,
                                   // the first choice alone is made
    Batch x;                       // [B, N, D]
    Batch candidates;              // [B, T, D], the rows that were drawn
    const float* x_scale;          // [B, N] or null
    const float* candidate_scale;  // [B, T] or null
    const float* weight;           // [B, N] or null: 1
    const std::int64_t* lengths;   // [B] or null: N
    const std::int64_t* drawn;     // [B, T], each below its length
    const double* limits;          // [B, T], at first not above the closest distances
    const std::int64_t* wanted;    // [B]: choices at most
    float* closest;                // [B, N]: squared distances from what is chosen, kept up to date
    std::int64_t* chosen;          // [B, T / each]: the rows, -1 after the last
    int threads;
    void* workspace;
};

}  // namespace ssl_fast
