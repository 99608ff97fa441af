#pragma once
// Losses of an input and a target, element by element, with the derivative by the input.

#include "core/pointwise.h"
#include "cpu/exponential.h"

namespace ssl_fast {
namespace {

struct Terms {
    Vec loss, slope;
};

// exp(-|x|) and 1 / (1 + exp(-|x|)), of which one exponential gives both softplus and sigmoid. NaN
// stays.
struct Tail {
    Vec power, share;
};
inline Tail tail_of(Vec x) {
    const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
    const Vec size = max(zero - x, x);
    const Vec power = exp_of(max(broadcast(-104.0f), zero - size));
    return {power, one / (one + power)};
}

// Binary cross-entropy of sigmoid(x). The terms that cancel where the loss is near 0 are never
// made: for x > 0 it is (1 - t) x + log(1 + exp(-x)), else -t x + log(1 + exp(x)).
inline Terms bce_with_logits_terms(Vec x, Vec t) {
    const Vec zero = broadcast(0.0f), rest = broadcast(1.0f) - t;
    const Tail tail = tail_of(x);
    const Vec small = tail.power * tail.share;
    // x - x makes NaN of -inf, as torch does.
    const Vec linear = select_greater(x, zero, rest * x, (x - x) - t * x);
    return {linear + log1p(tail.power), select_greater(x, zero, rest - small, small - t)};
}

// The same with weight w on the positive part.
inline Terms bce_with_logits_terms(Vec x, Vec t, Vec w) {
    const Vec zero = broadcast(0.0f), one = broadcast(1.0f), rest = one - t;
    const Tail tail = tail_of(x);
    const Vec small = tail.power * tail.share;
    const Vec factor = fma(w - one, t, one);
    const Vec linear = select_greater(x, zero, rest * x, (x - x) - t * w * x);
    const Vec below = small - t * fma(w - one, tail.share, one);
    return {fma(factor, log1p(tail.power), linear),
            select_greater(x, zero, rest - factor * small, below)};
}

// `parameter` is smooth_l1's beta or huber's delta.
template <Kind KIND>
inline Terms terms(Vec x, Vec t, float parameter) {
    const Vec zero = broadcast(0.0f), one = broadcast(1.0f), half = broadcast(0.5f);
    if constexpr (KIND == Kind::bce_with_logits) return bce_with_logits_terms(x, t);
    if constexpr (KIND == Kind::bce) {
        // Logarithms end at -100, and the derivative's denominator at 1e-12, as in torch.
        const Vec limit = broadcast(-100.0f), rest = one - x;
        const Vec loss = (t - one) * max(limit, log_of_rest(x)) - t * max(limit, log_of(x));
        return {loss, (x - t) / max(broadcast(1e-12f), rest * x)};
    }
    const Vec d = x - t, size = max(zero - d, d);
    if constexpr (KIND == Kind::mse) return {d * d, d + d};
    // Of NaN, l1's sign is 0 in torch, the others' NaN.
    const Vec neither = KIND == Kind::l1 ? zero : d;
    const Vec sign = select_greater(d, zero, one, select_greater(zero, d, zero - one, neither));
    if constexpr (KIND == Kind::l1) return {size, sign};
    const Vec limit = broadcast(parameter);
    if constexpr (KIND == Kind::smooth_l1) {
        // Where beta is 0 nothing is below it, and the quotient is not used.
        const Vec scaled = d / limit;
        return {select_greater(limit, size, half * d * scaled, size - half * limit),
                select_greater(limit, size, scaled, sign)};
    }
    return {select_greater(limit, size, half * d * d, limit * (size - half * limit)),
            select_greater(limit, size, d, limit * sign)};
}

}  // namespace
}  // namespace ssl_fast
