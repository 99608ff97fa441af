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
    // In double: three roundings at the size of a large logit would show in every weight.
    const double lse = static_cast<double>(reference) + static_cast<double>(__builtin_log2f(sum));
    t.lse = empty ? -__builtin_inff() : static_cast<float>(lse * 0.69314718055994530942);
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

// [D] each, of one thread.
struct RowBuffers {
    float *row, *other, *gradient, *output;
};

// A row's gradients in the backward pass, from `key_sum` [D], the weighted sum of its keys.
inline void finish_given(const PairSoftmax& c, int64_t i, const float* key_sum,
                         const RowBuffers& buffers) {
    const float* q = widen(c.query, c.dtype, i, c.d, buffers.row);
    const float along =
        through_norm(q, key_sum, c.query_scale[i], 1.0f, false, c.d, buffers.output);
    if (c.grad_query_scale != nullptr) c.grad_query_scale[i] = along;
    if (c.grad_query != nullptr) narrow(buffers.output, c.dtype, i, c.d, c.grad_query);
}

// A row's loss and gradients. `key_sum` [D] sums the keys by their exponentials, or is null where
// no gradient is asked for; `query_scale` is the scale times the query's inverse norm; `key_norm`
// the inverse norm of an in-batch positive.
inline RowTerms finish_loss(const PairSoftmax& c, int64_t i, float maximum, float reference,
                            float sum, const float* key_sum, float query_scale, float key_norm,
                            const RowBuffers& buffers) {
    const bool in_batch = c.positive.data == nullptr;
    const float* q = widen(c.query, c.dtype, i, c.d, buffers.row);
    const float* p = widen(in_batch ? c.key : c.positive, c.dtype, i, c.d, buffers.other);
    const float p_norm = in_batch ? key_norm : c.normalize ? inverse_norm(p, c.d) : 1.0f;
    const float product = dot(q, p, c.d);
    const float positive = query_scale * p_norm * product;
    const RowTerms t = row_terms(maximum, reference, sum, positive);
    c.row_lse[i] = t.lse;
    c.row_max[i] = t.maximum;
    c.positive_logit[i] = positive;
    c.loss[i] = t.loss;
    if (key_sum != nullptr) {
        combine(key_sum, t.factor, p, -t.coefficient * p_norm, c.d, buffers.gradient);
        const float q_norm = c.normalize ? inverse_norm(q, c.d) : 1.0f;
        const float along =
            through_norm(q, buffers.gradient, *c.scale, q_norm, c.normalize, c.d, buffers.output);
        if (c.grad_scale != nullptr) c.grad_scale[i] = q_norm * along;
        if (c.grad_query != nullptr) narrow(buffers.output, c.dtype, i, c.d, c.grad_query);
    }
    if (c.grad_positive != nullptr) {
        const float pull = -t.coefficient * query_scale;
        if (c.normalize)
            combine(q, pull * p_norm, p, -pull * (product * p_norm) * p_norm * p_norm, c.d,
                    buffers.output);
        else
            multiply(q, pull, c.d, buffers.output);
        narrow(buffers.output, c.dtype, i, c.d, c.grad_positive);
    }
    return t;
}

}  // namespace
}  // namespace ssl_fast
