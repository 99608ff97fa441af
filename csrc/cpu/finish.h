#pragma once
// What is sparse or linear, in closed form: the positive, the loss, and the gradients through
// scales and norms, row by row.

#include "cpu/layout.h"

namespace ssl_fast {
namespace {

struct RowTerms {
    float lse, maximum;  // over the negatives, in nats
    float loss;
    float coefficient;  // d loss / d lse
    float factor;       // from exponentials relative to the reference to weights
};

// softplus(z) and its derivative at z = lse - positive keep a loss of 1e-6 and a coefficient near
// 1 exact, where lse over all minus the positive would cancel.
inline RowTerms row_terms(float maximum, float reference, float sum, float positive) {
    RowTerms t;
    const bool empty = sum == 0.0f;
    t.lse = empty ? -__builtin_inff() : (reference + __builtin_log2f(sum)) * LN2;
    t.maximum = sum != sum ? sum : maximum * LN2;
    const float z = t.lse - positive;
    const float tail = __builtin_expf(z > 0.0f ? -z : z);
    t.loss = (z > 0.0f ? z : 0.0f) + __builtin_log1pf(tail);
    t.coefficient = z > 0.0f ? 1.0f / (1.0f + tail) : tail / (1.0f + tail);
    t.factor = empty ? 0.0f : t.coefficient / sum;
    return t;
}

// out = x * x_factor + y * y_factor
inline void combine(const float* x, float x_factor, const float* y, float y_factor, int64_t d,
                    float* out) {
    for (int64_t e = 0; e < d; ++e) out[e] = x[e] * x_factor + y[e] * y_factor;
}

inline void multiply(const float* x, float factor, int64_t d, float* out) {
    for (int64_t e = 0; e < d; ++e) out[e] = x[e] * factor;
}

// The gradient of a row x that entered as (factor * inverse_norm * x), from the gradient g of
// (inverse_norm * x) / inverse_norm: factor * inverse_norm * (g - unit(x) <unit(x), g>). Without
// normalisation x itself has no part in it: 0 * inf would be NaN. Returns <x, g>.
inline float through_norm(const float* x, const float* g, float factor, float inverse_norm,
                          bool normalize, int64_t d, float* out) {
    const float along = dot(x, g, d);
    if (normalize)
        combine(g, factor * inverse_norm, x,
                -factor * (along * inverse_norm) * inverse_norm * inverse_norm, d, out);
    else
        multiply(g, factor * inverse_norm, d, out);
    return along;
}

}  // namespace
}  // namespace ssl_fast
