#pragma once

#include "core/task.h"
#include "cpu/run.h"

namespace paramkit::cpu {

// Swaps the two sides of every task, bit for bit, through a block of scratch a thread. No task may convert
// or repeat its source, and no memory may be part of two sides: the caller knows that. Sources are written.
void exchange(const Program& program, int threads, Parallel parallel);

}  // namespace paramkit::cpu
