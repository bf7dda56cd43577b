#pragma once

#include <cstddef>
#include <vector>

#include "core/task.h"

namespace paramkit {

// The tasks [first, last) of a program.
struct Tasks {
  const Program* program;
  size_t first, last;
};

// Whether one of the tasks may write memory that another one reads or writes. Two that write are known to be
// apart if the stretches of memory from the first to the last byte of each are, or if their steps tell, as
// those of columns of one matrix. What is read is compared by its stretches alone.
bool share_memory(const Program& program, size_t first, size_t last);
bool share_memory(const std::vector<Tasks>& all);

}  // namespace paramkit
