#pragma once
// What passes over memory share: blocks of work whose sums merge in a fixed order, and stores that
// go past the caches.

#include "cpu/accumulate.h"
#include "cpu/layout.h"

namespace ssl_fast {
namespace {

// What is written and is larger than this would push out of the cache what is still to be read, and
// be pushed out itself before anyone reads it. The last-level caches of a machine are no guide:
// virtual machines report those of all sockets.
constexpr int64_t STREAMED_BYTES = int64_t{32} << 20;

inline bool aligned(const void* p, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

// A store past the caches, to an address aligned as the vector is.
inline void store_past(float* p, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, v);
#elif defined(__x86_64__)
    _mm_stream_ps(p, v);
#else
    store(p, v);
#endif
}

// Before other threads, or the caller, may read what was stored past the caches.
inline void finish_stores() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Copies to any address; the aligned middle goes past the caches.
inline void copy_past(char* to, const char* from, int64_t bytes) {
    constexpr int64_t STEP = WIDTH * sizeof(float);
    const int64_t misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % STEP);
    const int64_t head = smaller(misplaced == 0 ? 0 : STEP - misplaced, bytes);
    __builtin_memcpy(to, from, head);
    int64_t i = head;
    for (; i + STEP <= bytes; i += STEP) {
        float lanes[WIDTH];
        __builtin_memcpy(lanes, from + i, STEP);
        store_past(reinterpret_cast<float*>(to + i), load(lanes));
    }
    __builtin_memcpy(to + i, from + i, bytes - i);
}

// Hands blocks of work to the team, and adds up what they gave in the order of the blocks.
template <int SUMS>
class Blocks {
  public:
    Blocks(Arena& arena, int64_t count)
        : count_(count),
          counter_(arena.take<int64_t>(1)),
          sums_(arena.take<double>(count * SUMS)) {}

    // body(block, sums) for each block; then every sum over them, on rank 0 alone.
    template <class Body, class Finish>
    void run(Team* team, Body body, Finish finish) {
        if (team->rank == 0) *counter_ = 0;
        team_barrier(team);
        Tickets tickets(counter_);
        while (tickets.take(count_)) body(tickets.ticket(), sums_ + tickets.ticket() * SUMS);
        finish_stores();
        team_barrier(team);
        if (team->rank != 0) return;
        double total[SUMS] = {};
        for (int64_t block = 0; block < count_; ++block)
            for (int s = 0; s < SUMS; ++s) total[s] += sums_[block * SUMS + s];
        finish(total);
    }

  private:
    int64_t count_;
    int64_t* counter_;
    double* sums_;
};

inline Vec value_at(Vec, const float* p) { return load(p); }
inline float value_at(float, const float* p) { return *p; }

// The sum of term(lane type, e) over e < d, in fp32 within 4096 elements and in double across.
template <class Term>
inline double sum_terms(int64_t d, Term term) {
    constexpr int64_t LIMIT = 4096;
    double total = 0.0;
    for (int64_t begin = 0; begin < d; begin += LIMIT) {
        const int64_t end = smaller(begin + LIMIT, d);
        Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
        int64_t e = begin;
        for (; e + 4 * WIDTH <= end; e += 4 * WIDTH)
            for (int v = 0; v < 4; ++v) sums[v] = sums[v] + term(Vec{}, e + v * WIDTH);
        for (; e + WIDTH <= end; e += WIDTH) sums[0] = sums[0] + term(Vec{}, e);
        float tail = 0.0f;
        for (; e < end; ++e) tail += term(0.0f, e);
        total += static_cast<double>(sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + tail);
    }
    return total;
}

}  // namespace
}  // namespace ssl_fast
