#pragma once

#include <vector>

#include "core/partition.h"
#include "core/task.h"

namespace paramkit::cpu {

// How the caller's threads are used: runs body(context, i) for i in [0, n), any order, and waits.
using Parallel = void (*)(int n, void (*body)(void*, int), void* context);

// Below this many bytes a second thread costs more to wake than it saves.
inline constexpr int64_t kParallelBytes = 256 << 10;

// A destination larger than this in all goes past the cache. Measured with 2 threads of an AVX-512
// machine: ordinary stores win up to the cache's size, streaming ones by 1.5x and more beyond it.
int64_t stream_bytes();

// Runs the tasks [first, last) of a program. `threads` > 1 promises that no two tasks touch the same
// destination memory; tasks run in order when it is 1.
void run(const Program& program, size_t first, size_t last, int threads, Parallel parallel);

// Whether every destination holds what its source says, bit for bit, for one task.
bool equal(const Program& program, const Task& task);

}  // namespace paramkit::cpu
