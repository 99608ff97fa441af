#pragma once
// Exponentials and logarithms in nats, with fp32's digits over the whole range.

#include "cpu/weights.h"

namespace ssl_fast {
namespace {

// x * LOG2E - y, where y is the rounded product.
inline Vec rounded_off(Vec x, Vec y) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
    return fma(x, broadcast(LOG2E), broadcast(0.0f) - y);
#else
    // Dekker's product of halves of 12 bits, each exact.
    constexpr float SPLIT = 4097.0f, HIGH = SPLIT * LOG2E - (SPLIT * LOG2E - LOG2E);
    const Vec scaled = x * broadcast(SPLIT);
    const Vec high = scaled - (scaled - x), low = x - high;
    const Vec h = broadcast(HIGH), l = broadcast(LOG2E - HIGH);
    return ((high * h - y) + high * l + low * h) + low * l;
#endif
}

// exp(x) for x from -104 to 88.7. The rounding of x log2(e), a relative error of 5e-6 at x = 88, is
// put back by a first-order term.
inline Vec exp_of(Vec x) {
    const Vec y = x * broadcast(LOG2E);
    const Vec lost = fma(x, broadcast(LOG2E_REST), rounded_off(x, y));
    const Vec power = exp2(y);
    return fma(power, lost * broadcast(LN2), power);
}

// x = mantissa 2^exponent with a mantissa in [1, 2), for a normal x > 0.
inline Vec mantissa_of(Vec x, Vec* exponent) {
#if defined(__AVX512F__)
    *exponent = _mm512_getexp_ps(x);
    return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
#elif defined(__AVX2__)
    const __m256i bits = _mm256_castps_si256(x);
    *exponent =
        _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff)),
                                               _mm256_set1_epi32(0x3f800000)));
#else
    const IntVec bits = reinterpret_cast<IntVec>(x);
    *exponent = __builtin_convertvector((bits >> 23) - 127, Vec);
    return reinterpret_cast<Vec>((bits & 0x7fffff) | 0x3f800000);
#endif
}

// The natural logarithm of a finite number, within 1.4 ulp: 0 has -inf, what is below NaN. NaN
// stays.
inline Vec log_of(Vec x) {
    const Vec zero = broadcast(0.0f), one = broadcast(1.0f), least = broadcast(1.17549435e-38f);
    // Subnormals, which a kernel may flush to 0, are made normal.
    const Vec normal = select_greater(least, x, x * broadcast(4294967296.0f), x);
    Vec exponent;
    const Vec m = mantissa_of(normal, &exponent);
    exponent = select_greater(least, x, exponent - broadcast(32.0f), exponent);
    // From sqrt(1/2) to sqrt(2), so that the logarithm of a number near 1 keeps its digits.
    const Vec root = broadcast(1.41421356f);
    const Vec f = select_greater(m, root, m * broadcast(0.5f), m) - one;
    exponent = select_greater(m, root, exponent + one, exponent);
    Vec p = broadcast(7.0376836292e-2f);
    p = fma(p, f, broadcast(-1.1514610310e-1f));
    p = fma(p, f, broadcast(1.1676998740e-1f));
    p = fma(p, f, broadcast(-1.2420140846e-1f));
    p = fma(p, f, broadcast(1.4249322787e-1f));
    p = fma(p, f, broadcast(-1.6668057665e-1f));
    p = fma(p, f, broadcast(2.0000714765e-1f));
    p = fma(p, f, broadcast(-2.4999993993e-1f));
    p = fma(p, f, broadcast(3.3333331174e-1f));
    const Vec square = f * f;
    // exponent log(2) in two parts, of which the first is exact.
    Vec low = fma(exponent, broadcast(-2.12194440e-4f), p * square * f);
    low = fma(square, broadcast(-0.5f), low);
    const Vec found = fma(exponent, broadcast(0.693359375f), f + low);
    const Vec positive = select_greater(normal, zero, found, broadcast(-__builtin_inff()));
    return select_greater(zero, x, broadcast(__builtin_nanf("")), positive) + zero * x;
}

// log(1 - x) for x in [0, 1], with the digits of a small x.
inline Vec log_of_rest(Vec x) {
    const Vec one = broadcast(1.0f), rest = one - x;
    const Vec lost = ((one - rest) - x) / max(rest, broadcast(1e-30f));
    return log_of(rest) + lost;
}

}  // namespace
}  // namespace ssl_fast
