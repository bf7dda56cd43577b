#pragma once

#include <cstdint>
#include <vector>

#include "core/task.h"
#include "cpu/run.h"

namespace paramkit::cpu {

// For each task of a program, whether its destination holds what its source says, bit for bit (after a
// cast, any NaN equals any). `threads` > 1 looks at parts of long tasks on several threads.
std::vector<char> equal(const Program& program, int threads, Parallel parallel);

}  // namespace paramkit::cpu
