#pragma once

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

// Runs body(team, context) on `threads` threads and returns when all have finished. One thread runs
// on the caller and never enters the thread runtime: libgomp hangs in a forked child that
// inherited a pool.
void run_team(int threads, void (*body)(Team* team, void* context), void* context);

}  // namespace ssl_fast
