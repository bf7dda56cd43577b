#pragma once

#include <vector>

#include "core/partition.h"
#include "core/task.h"

namespace paramkit::cpu {

// How the caller's threads are used: runs body(context, i) for i in [0, n), any order, and waits.
using Parallel = void (*)(int n, void (*body)(void*, int), void* context);

// Below this many bytes a second thread costs more to wake than it saves.
inline constexpr int64_t kParallelBytes = 256 << 10;

// Programs that write at least this many bytes in all go past the cache: 32 MiB. In benchmarks/results/streaming
// copies gain from less on, but below 32 MiB the spread is wide, and what a cache holds is worth keeping there.
// PARAMKIT_STREAM_BYTES and set_stream_bytes() override it; a negative number restores it. Transposes do from an
// eighth of it on: their lines are far apart, so that ordinary stores wait for each line to be read
// (4096 x 4096 uint8: 12 GB/s with them, 34 without), cached or not. Fills do from four times it on: they
// read nothing, and the cache takes twice as much of them (32 MiB: 27 GB/s past it, 35 through it).
int64_t stream_bytes();
void set_stream_bytes(int64_t bytes);

// Runs the tasks [first, last) of a program. `threads` > 1 promises that no two tasks touch the same
// destination memory; tasks run in order when it is 1.
void run(const Program& program, size_t first, size_t last, int threads, Parallel parallel);

}  // namespace paramkit::cpu
