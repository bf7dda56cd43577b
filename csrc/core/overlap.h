#pragma once

#include <cstddef>
#include <vector>

#include "core/task.h"

namespace paramkit {

// Whether one of the tasks [first, last) may write memory that another one reads or writes: false only if
// the stretches of memory from the first to the last byte of each lie apart.
bool share_memory(const Program& program, size_t first, size_t last);

// The same of all tasks of several programs.
bool share_memory(const std::vector<const Program*>& programs);

}  // namespace paramkit
