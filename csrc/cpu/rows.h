#pragma once
// Rows of features in their own dtype, read as fp32 and written back.

#include <cstdint>

#include "core/pair_softmax.h"
#include "cpu/vec.h"

namespace ssl_fast {
namespace {

inline float bits_to_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float fp16_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // 2^112 rebases the exponent; a subnormal half becomes a normal float by the subtraction.
    if (magnitude < 0x400) {
        const float f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    return bits_to_float(sign | ((magnitude << 13) + 0x38000000));
}

inline uint16_t float_to_fp16(float x) {
    const uint32_t bits = float_to_bits(x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {
        // Adding 0.5 aligns the significand to multiples of 2^-24, rounded to nearest even.
        return static_cast<uint16_t>(sign |
                                     (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign |
                                 ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline const char* row_at(const Rows& rows, Dtype dtype, int64_t i) {
    return static_cast<const char*>(rows.data) + i * rows.stride * element_size(dtype);
}

// The row as fp32: itself where it already is, else widened into `buffer`.
inline const float* widen(const Rows& rows, Dtype dtype, int64_t i, int64_t d, float* buffer) {
    const char* source = row_at(rows, dtype, i);
    if (dtype == Dtype::float32) return reinterpret_cast<const float*>(source);
    const uint16_t* half = reinterpret_cast<const uint16_t*>(source);
    if (dtype == Dtype::bfloat16) {
        for (int64_t x = 0; x < d; ++x) buffer[x] = bf16_to_float(half[x]);
        return buffer;
    }
    int64_t x = 0;
#if defined(__F16C__)
    for (; x + 8 <= d; x += 8)
        _mm256_storeu_ps(
            buffer + x,
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + x))));
    if (x + 4 <= d) {
        _mm_storeu_ps(buffer + x,
                      _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(half + x))));
        x += 4;
    }
#endif
    for (; x < d; ++x) buffer[x] = fp16_to_float(half[x]);
    return buffer;
}

// Row i of a contiguous [., d] output from fp32.
inline void narrow(const float* row, Dtype dtype, int64_t i, int64_t d, void* output) {
    if (dtype == Dtype::float32) {
        float* out = static_cast<float*>(output) + i * d;
        if (out != row) __builtin_memcpy(out, row, d * sizeof(float));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(output) + i * d;
    if (dtype == Dtype::bfloat16) {
        for (int64_t x = 0; x < d; ++x) out[x] = float_to_bf16(row[x]);
        return;
    }
    int64_t x = 0;
#if defined(__F16C__)
    for (; x + 8 <= d; x += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + x),
                         _mm256_cvtps_ph(_mm256_loadu_ps(row + x), 0));
#endif
    for (; x < d; ++x) out[x] = float_to_fp16(row[x]);
}

inline float dot(const float* x, const float* y, int64_t d) {
    Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    int64_t e = 0;
    for (; e + 4 * WIDTH <= d; e += 4 * WIDTH)
        for (int v = 0; v < 4; ++v)
            sums[v] = fma(load(x + e + v * WIDTH), load(y + e + v * WIDTH), sums[v]);
    float tail = 0.0f;
    for (; e + WIDTH <= d; e += WIDTH) sums[0] = fma(load(x + e), load(y + e), sums[0]);
    for (; e < d; ++e) tail += x[e] * y[e];
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + tail;
}

// 1 / norm. A zero row stays zero and gets no gradient: its direction is not defined, and the
// 1e12 of a clamped norm would overflow a half.
inline float inverse_norm(const float* row, int64_t d) {
    const float norm = __builtin_sqrtf(dot(row, row, d));
    return norm <= 1e-12f ? 0.0f : 1.0f / norm;
}

}  // namespace
}  // namespace ssl_fast
