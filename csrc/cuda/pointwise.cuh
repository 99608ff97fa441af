#pragma once
// Losses of an input and a target, element by element, as in cpu/pointwise.h.

#include "core/pointwise.h"

namespace ssl_fast {
namespace cuda {

struct Terms {
    float loss, slope;
};

// Binary cross-entropy of sigmoid(x), with weight w on its positive part. The terms that cancel
// where the loss is near 0 are never made: for x > 0 it is (1 - t) x + f log(1 + exp(-x)), else
// -t w x + f log(1 + exp(x)), f = 1 + (w - 1) t.
__device__ inline Terms bce_with_logits_terms(float x, float t, float w) {
    const float power = expf(-fabsf(x)), share = 1.0f / (1.0f + power);
    const float small = power * share, rest = 1.0f - t, factor = fmaf(w - 1.0f, t, 1.0f);
    const float tail = factor * log1pf(power);
    if (x > 0.0f) return {fmaf(rest, x, tail), rest - factor * small};
    // x - x makes NaN of -inf, as torch does.
    return {(x - x) - t * w * x + tail, small - t * fmaf(w - 1.0f, share, 1.0f)};
}

// Logarithms end at -100, and the derivative's denominator at 1e-12, as in torch.
__device__ inline Terms bce_terms(float x, float t) {
    float log_x = logf(x), log_rest = log1pf(-x);
    // NaN stays, which fmaxf would drop.
    log_x = log_x < -100.0f ? -100.0f : log_x;
    log_rest = log_rest < -100.0f ? -100.0f : log_rest;
    const float width = (1.0f - x) * x;
    return {(t - 1.0f) * log_rest - t * log_x, (x - t) / (width < 1e-12f ? 1e-12f : width)};
}

// `parameter` is smooth_l1's beta or huber's delta; `w` bce_with_logits' pos_weight.
template <Kind KIND>
__device__ Terms terms(float x, float t, float w, float parameter) {
    if constexpr (KIND == Kind::bce_with_logits) return bce_with_logits_terms(x, t, w);
    if constexpr (KIND == Kind::bce) return bce_terms(x, t);
    const float d = x - t, size = fabsf(d);
    if constexpr (KIND == Kind::mse) return {d * d, d + d};
    // Of NaN, l1's sign is 0 in torch, the others' NaN.
    const float neither = KIND == Kind::l1 ? 0.0f : d;
    const float sign = d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : neither;
    if constexpr (KIND == Kind::l1) return {size, sign};
    const bool near = size < parameter;
    if constexpr (KIND == Kind::smooth_l1)
        return {near ? 0.5f * d * (d / parameter) : size - 0.5f * parameter,
                near ? d / parameter : sign};
    return {near ? 0.5f * d * d : parameter * (size - 0.5f * parameter),
            near ? d : parameter * sign};
}

}  // namespace cuda
}  // namespace ssl_fast
