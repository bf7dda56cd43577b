// The kernels of one instruction set, behind one table, so that the choice is made once at run time.
#pragma once

#include "core/partition.h"
#include "core/task.h"

namespace paramkit::cpu {

struct Kernels {
  const char* name;
  // Runs the part of the program between two cuts. `stream`: long contiguous runs bypass the cache.
  void (*run)(const Program& program, Cut from, Cut to, bool stream);
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace paramkit::cpu
