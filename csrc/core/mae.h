#pragma once
// The signature of mae: the mean over removed patches of their mean squared error.

#include "core/clustering.h"

namespace ssl_fast {

// Images [B, channels, H, W] of which patch l is the block (l / columns, l % columns), its elements
// in the order (row, column, channel). Strides count elements.
struct Images {
    std::int64_t channels, patch_rows, patch_columns, columns;
    std::int64_t strides[4];
};

// The target t_i of a patch is normalised to (t - mean) / sqrt(variance + 1e-6) on request.
struct Mae {
    Dtype dtype, target_dtype;
    std::int64_t b, l, p;
    Batch pred;         // [B, L, P]
    Batch target;       // [B, L, P], or images where images.channels > 0
    Images images;      // channels 0: patches
    const float* mask;  // [B, L]: a patch's weight; one with 0 is neither read nor counted
    bool normalize;

    // The forward pass.
    float* loss;   // []: sum of mask * loss over the sum of mask; 0 where that is 0
    float* scale;  // []: 1 / the sum of mask, or 0; the backward pass reads it

    // The backward pass, where weight is given; with grad_pred and no weight the forward pass makes
    // the gradient too, for a weight of 1.
    const float* weight;  // []: the gradient of the loss
    void* grad_pred;      // [B, L, P] contiguous; zeros in patches that aren't counted

    int threads;
    void* workspace;
};

}  // namespace ssl_fast
