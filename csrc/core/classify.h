#pragma once

#include "core/task.h"

namespace paramkit {

// Chooses the kernel family of a normalized write: takes the dense innermost loop into `task.run`,
// brings the loops into the order that the family wants, and sets family, rank, run and units.
// `task.width` must be set.
void classify(Task& task, Dim* dims, int rank);

// The bytes that one unit of a task moves, for the partition. Close, not exact.
int64_t unit_bytes(const Task& task, const Dim* dims);

}  // namespace paramkit
