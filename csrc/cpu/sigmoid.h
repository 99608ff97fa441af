#pragma once
// The epilogue of pair_sigmoid: from a panel's logits, in units of log 2 and without the bias, to
// sigmoids in place and the rows' sums of softplus.

#include "cpu/weights.h"

namespace ssl_fast {
namespace {

// Of each row; a sum of 100000 softplus values keeps fp32's accuracy by what each addition lost.
struct SigmoidSums {
    float* loss;
    float* lost;
    float* weight;
};

// softplus in nats and sigmoid of x = s / log 2. Both come from exp(-|s|), which is never lost
// beside 1: a softplus near 0 has all its digits.
inline Vec softplus_sigmoid(Vec x, Vec* sigmoid) {
    const Vec one = broadcast(1.0f);
    const Vec tail = exp2(broadcast(0.0f) - max(x, broadcast(0.0f) - x));
    *sigmoid = select_negative(x, tail, one) / (one + tail);
    return fma(max(x, broadcast(0.0f)), broadcast(LN2), log1p(tail));
}

// The logits become weights, sigmoid times the row's weight.
inline void sigmoid_weights(float* logits, int rows, float bias, const float* row_weight,
                            const SigmoidSums& sums) {
    const Vec shift = broadcast(bias);
    for (int v = 0; v < LANES; v += WIDTH) {
        const Vec factor = load(row_weight + v);
        Vec loss = broadcast(0.0f), weight = broadcast(0.0f);
        for (int row = 0; row < rows; ++row) {
            float* p = logits + row * LANES + v;
            Vec sigmoid;
            loss = loss + softplus_sigmoid(load(p) + shift, &sigmoid);
            weight = fma(sigmoid, factor, weight);
            store(p, sigmoid * factor);
        }
        const Vec old = load(sums.loss + v), added = loss - load(sums.lost + v), now = old + added;
        // An infinite sum stays what it is: inf - inf would make it NaN.
        store(sums.lost + v,
              select_negative(now - broadcast(LARGEST), (now - old) - added, broadcast(0.0f)));
        store(sums.loss + v, now);
        store(sums.weight + v, load(sums.weight + v) + weight);
    }
}

struct Sigmoid {
    float softplus, value;
};

inline Sigmoid sigmoid_of(float s) {
    const float tail = __builtin_expf(s > 0.0f ? -s : s);
    return {(s > 0.0f ? s : 0.0f) + __builtin_log1pf(tail),
            (s < 0.0f ? tail : 1.0f) / (1.0f + tail)};
}

}  // namespace
}  // namespace ssl_fast
