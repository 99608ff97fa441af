#include "core/team.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(SSL_FAST_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ssl_fast {

struct Shared {
    std::atomic<int> arrived{0};
    std::atomic<int> generation{0};
};

namespace {

void relax(int spins) {
    // After about 20 us of spinning the core is better given to whoever is late.
    if (spins > 2000) {
        std::this_thread::yield();
        return;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

void team_barrier(Team* team) {
    if (team->size == 1) return;
    Shared& shared = *team->shared;
    const int generation = shared.generation.load(std::memory_order_acquire);
    if (shared.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team->size) {
        shared.arrived.store(0, std::memory_order_relaxed);
        shared.generation.store(generation + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; shared.generation.load(std::memory_order_acquire) == generation; ++spins)
        relax(spins);
}

void team_wait(const std::int64_t* counter, std::int64_t value) {
    for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != value; ++spins) relax(spins);
}

void run_team(int threads, void (*body)(Team*, void*), void* context) {
    Shared shared;
    if (threads <= 1) {
        Team team{0, 1, &shared};
        body(&team, context);
        return;
    }
#if defined(SSL_FAST_OPENMP)
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads(), &shared};
        body(&team, context);
    }
#else
    // Nobody begins before all threads are there: a team that lacks a member would wait for it
    // forever.
    enum Gate { CLOSED, OPEN, CANCELLED };
    std::atomic<int> gate{CLOSED};
    std::vector<std::thread> pool;
    try {
        pool.reserve(threads - 1);
        for (int rank = 1; rank < threads; ++rank)
            pool.emplace_back([=, &shared, &gate] {
                for (int spins = 0; gate.load(std::memory_order_acquire) == CLOSED; ++spins)
                    relax(spins);
                if (gate.load(std::memory_order_relaxed) == CANCELLED) return;
                Team team{rank, threads, &shared};
                body(&team, context);
            });
        gate.store(OPEN, std::memory_order_release);
    } catch (const std::system_error&) {
        gate.store(CANCELLED, std::memory_order_release);
    }
    const bool alone = gate.load(std::memory_order_relaxed) == CANCELLED;
    Team team{0, alone ? 1 : threads, &shared};
    if (!alone) body(&team, context);
    for (std::thread& thread : pool) thread.join();
    if (alone) body(&team, context);
#endif
}

}  // namespace ssl_fast
