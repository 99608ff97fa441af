#pragma once

#include <cstdint>

namespace ssl_fast {

// A group of threads that run one function together. Defined here without inline code, so that a
// translation unit compiled for a newer ISA never emits a shared copy.
struct Team {
    int rank;
    int size;
    struct Shared* shared;
};

// Every member calls it; none goes on before all have arrived.
void team_barrier(Team* team);

// Returns once a member has stored `value` in the counter, with what it wrote before.
void team_wait(const std::int64_t* counter, std::int64_t value);

// Runs body(team, context) on `threads` threads and returns when all have finished. One thread runs
// on the caller and never enters the thread runtime: libgomp hangs in a forked child that
// inherited a pool.
void run_team(int threads, void (*body)(Team* team, void* context), void* context);

}  // namespace ssl_fast
