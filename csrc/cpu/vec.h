#pragma once
// The few vector operations the kernels need, once per ISA. Included by the per-ISA translation
// units only; everything has internal linkage, so that the linker can't hand a copy compiled for
// a newer ISA to an older CPU.

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ssl_fast {
namespace {

#if defined(__AVX512F__)

constexpr int WIDTH = 16;
constexpr int VECTORS = 4;
constexpr int TILE_ROWS = 6;
using Vec = __m512;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Returns b where either is NaN.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline float sum_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
inline float max_lanes(Vec v) { return _mm512_reduce_max_ps(v); }
// 0 where lane id == id, v elsewhere is written as `otherwise`.
inline Vec select_equal(const int64_t* ids, int64_t id, Vec equal, Vec otherwise) {
    const __m512i wanted = _mm512_set1_epi64(id);
    const __mmask8 low = _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(ids), wanted);
    const __mmask8 high = _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(ids + 8), wanted);
    return _mm512_mask_blend_ps(static_cast<__mmask16>(low | high << 8), otherwise, equal);
}
// a where x < 0, else b; of x = NaN either.
inline Vec select_negative(Vec x, Vec a, Vec b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), b, a);
}
// x where a > b, else y.
inline Vec select_greater(Vec a, Vec b, Vec x, Vec y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
// A bit for each lane where a <= b does not hold: NaN counts as above.
inline unsigned lanes_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
// x - floor(x), and p * 2^floor(x): both defined for infinities.
inline Vec fraction(Vec x) { return _mm512_reduce_ps(x, 0x09); }
inline Vec scale_by_floor(Vec p, Vec x) { return _mm512_scalef_ps(p, x); }

#elif defined(__AVX2__)

constexpr int WIDTH = 8;
constexpr int VECTORS = 2;
constexpr int TILE_ROWS = 6;
using Vec = __m256;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline bool any_greater(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
inline Vec select_equal(const int64_t* ids, int64_t id, Vec equal, Vec otherwise) {
    alignas(32) int32_t mask[WIDTH];
    for (int lane = 0; lane < WIDTH; ++lane) mask[lane] = ids[lane] == id ? -1 : 0;
    const __m256i m = _mm256_load_si256(reinterpret_cast<const __m256i*>(mask));
    return _mm256_blendv_ps(otherwise, equal, _mm256_castsi256_ps(m));
}
inline Vec select_negative(Vec x, Vec a, Vec b) { return _mm256_blendv_ps(b, a, x); }
inline Vec select_greater(Vec a, Vec b, Vec x, Vec y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
inline unsigned lanes_above(Vec a, Vec b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
}
inline Vec clamp_exponent(Vec x) {
    // The constant comes first: max and min return their second operand where one is NaN.
    return _mm256_max_ps(_mm256_set1_ps(-127.0f), _mm256_min_ps(_mm256_set1_ps(128.0f), x));
}
inline Vec fraction(Vec x) {
    const Vec c = clamp_exponent(x);
    return c - _mm256_floor_ps(c);
}
inline Vec scale_by_floor(Vec p, Vec x) {
    const __m256i n = _mm256_cvtps_epi32(_mm256_floor_ps(clamp_exponent(x)));
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
    return p * _mm256_castsi256_ps(bits);
}

#else

// GCC and Clang vector extensions: SSE2 on x86-64, NEON on aarch64, plain code elsewhere.
constexpr int WIDTH = 4;
constexpr int VECTORS = 2;
constexpr int TILE_ROWS = 6;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));

inline Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline bool any_greater(Vec a, Vec b) {
    const IntVec greater = a > b;
    return greater[0] || greater[1] || greater[2] || greater[3];
}
inline Vec select_equal(const int64_t* ids, int64_t id, Vec equal, Vec otherwise) {
    IntVec mask;
    for (int lane = 0; lane < WIDTH; ++lane) mask[lane] = ids[lane] == id ? -1 : 0;
    return mask ? equal : otherwise;
}
inline Vec select_negative(Vec x, Vec a, Vec b) { return x < broadcast(0.0f) ? a : b; }
inline Vec select_greater(Vec a, Vec b, Vec x, Vec y) { return a > b ? x : y; }
inline unsigned lanes_above(Vec a, Vec b) {
    const IntVec below = a <= b;
    unsigned lanes = 0;
    for (int lane = 0; lane < WIDTH; ++lane) lanes |= (below[lane] == 0 ? 1u : 0u) << lane;
    return lanes;
}
inline Vec clamp_exponent(Vec x) { return max(broadcast(-127.0f), min(broadcast(128.0f), x)); }
inline Vec floor_of(Vec x) {
    const Vec truncated = __builtin_convertvector(__builtin_convertvector(x, IntVec), Vec);
    return truncated > x ? truncated - 1.0f : truncated;
}
inline Vec fraction(Vec x) {
    const Vec c = clamp_exponent(x);
    return c - floor_of(c);
}
inline Vec scale_by_floor(Vec p, Vec x) {
    const IntVec n = __builtin_convertvector(floor_of(clamp_exponent(x)), IntVec);
    const IntVec bits = (n + 127) << 23;
    return p * reinterpret_cast<Vec>(bits);
}

#endif

#if !defined(__AVX512F__)
inline float sum_lanes(Vec v) {
    float lanes[WIDTH];
    store(lanes, v);
    for (int step = WIDTH / 2; step > 0; step /= 2)
        for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
    return lanes[0];
}
inline float max_lanes(Vec v) {
    float lanes[WIDTH];
    store(lanes, v);
    float highest = lanes[0];
    for (int lane = 1; lane < WIDTH; ++lane)
        highest = lanes[lane] > highest ? lanes[lane] : highest;
    return highest;
}
#endif

// Without it GCC folds the broadcast into each multiply-add that uses it, and the load ports become
// the bottleneck.
inline Vec keep_in_register(Vec v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__x86_64__)
    asm("" : "+x"(v));
#endif
    return v;
}

// to[column * to_stride + row] = from[row * from_stride + column], WIDTH x WIDTH.
#if defined(__AVX512F__)
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m512 x[16], y[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) x[r] = load(from + r * from_stride);
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        y[r] = _mm512_unpacklo_ps(x[r], x[r + 1]);
        y[r + 1] = _mm512_unpackhi_ps(x[r], x[r + 1]);
    }
    // x[4 g + c] holds, in 128-bit lane l, rows 4 g .. 4 g + 3 of column 4 l + c.
#pragma GCC unroll 4
    for (int g = 0; g < 16; g += 4) {
        x[g] = _mm512_shuffle_ps(y[g], y[g + 2], 0x44);
        x[g + 1] = _mm512_shuffle_ps(y[g], y[g + 2], 0xee);
        x[g + 2] = _mm512_shuffle_ps(y[g + 1], y[g + 3], 0x44);
        x[g + 3] = _mm512_shuffle_ps(y[g + 1], y[g + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512 low_even = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x88);
        const __m512 low_odd = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xdd);
        const __m512 high_even = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x88);
        const __m512 high_odd = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xdd);
        store(to + c * to_stride, _mm512_shuffle_f32x4(low_even, high_even, 0x88));
        store(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(low_even, high_even, 0xdd));
        store(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
        store(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
    }
}
#else
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int r = 0; r < WIDTH; ++r)
        for (int c = 0; c < WIDTH; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}
#endif

// Queries ride on the vector lanes.
constexpr int LANES = VECTORS * WIDTH;

// 2^x. The polynomial is the relative minimax of degree 5 on [0, 1) with p(0) = 1: 8.3e-8, so the
// result stays under 2 ulp. Below -126 the result is 0, at +inf it is +inf, NaN stays.
inline Vec exp2(Vec x) {
    const Vec f = fraction(x);
    Vec p = broadcast(0.00186713f);
    p = fma(p, f, broadcast(0.009017031f));
    p = fma(p, f, broadcast(0.055799913f));
    p = fma(p, f, broadcast(0.24016444f));
    p = fma(p, f, broadcast(0.6931513f));
    p = fma(p, f, broadcast(1.0f));
    return scale_by_floor(p, x);
}

// log(1 + t) for t in [0, 1]: t times the relative minimax polynomial of degree 8 of log1p(t) / t,
// 3.0e-8, so that a small t keeps its digits.
inline Vec log1p(Vec t) {
    Vec p = broadcast(0.005232690f);
    p = fma(p, t, broadcast(-0.029505219f));
    p = fma(p, t, broadcast(0.078225918f));
    p = fma(p, t, broadcast(-0.13663243f));
    p = fma(p, t, broadcast(0.19106005f));
    p = fma(p, t, broadcast(-0.24842982f));
    p = fma(p, t, broadcast(0.33319098f));
    p = fma(p, t, broadcast(-0.49999493f));
    p = fma(p, t, broadcast(0.99999994f));
    return p * t;
}

// Subnormal weights (a similarity 87 nats below its row's maximum) cost an assist of about 150
// cycles each on Intel and change nothing: they are flushed to zero inside the kernels.
class FlushSubnormals {
  public:
#if defined(__x86_64__)
    FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved_); }
#else
    FlushSubnormals() : saved_(0) {}
#endif
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  private:
    unsigned saved_;
};

}  // namespace
}  // namespace ssl_fast
