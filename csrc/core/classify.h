#pragma once

#include "core/task.h"

namespace paramkit {

// Chooses the kernel family of a normalized write: takes the dense innermost loop into `task.run`,
// brings the loops into the order that the family wants, and sets family, rank, run and units.
// `task.to` and `task.from` must be set; where bytes are only moved they may become wider.
void classify(Task& task, Dim* dims, int rank);

// The bytes that one unit of a task moves, for the partition: the mean of what is read and written.
// Close, not exact.
int64_t unit_bytes(const Task& task, const Dim* dims);

// A transpose in which one of the two runs is a pair, and the pairs lie side by side: the real and
// imaginary halves of rotary embeddings. It has a path of its own, without tiles. Of 16 bytes a pair is two registers, and tiles do.
enum class Pairs : uint8_t { None, Zip, Unzip };
Pairs pairs_of(const Task& task, const Dim* dims);

// The elements of the two runs of a transpose.
struct Runs {
  int64_t across, along;
};
Runs runs_of(const Task& task, const Dim* dims);

}  // namespace paramkit
