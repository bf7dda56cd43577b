#pragma once

#include <cstddef>
#include <vector>

#include "core/task.h"

namespace paramkit {

// A place in a program: before unit `unit` of task `task`.
struct Cut {
  size_t task;
  int64_t unit;
};

// Cuts the tasks [first, last) into `pieces` runs of about equal cost; piece i goes from cuts[i] to
// cuts[i + 1]. The cost of a task is its bytes plus a constant, so that ten thousand tiny tensors and
// one huge one both keep every thread busy.
void partition(const Program& program, size_t first, size_t last, int pieces, std::vector<Cut>& cuts);

}  // namespace paramkit
