// The kernels of one instruction set, behind one table, so that the choice is made once at run time.
#pragma once

#include "core/partition.h"
#include "core/task.h"

namespace paramkit::cpu {

// Which stores go past the cache: those of long runs, of fills, of transposes.
struct Stream {
  bool runs, fills, tiles;
};

struct Kernels {
  const char* name;
  // Runs the part of the program between two cuts.
  void (*run)(const Program& program, Cut from, Cut to, Stream stream);
  // Converts n contiguous elements.
  void (*cast)(Type to, Type from, char* dst, const char* src, int64_t n);
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// What is too large for float8_e4m3fn becomes its largest value, as in torch from 2.13 on, or NaN, as
// before. Set once, from what the installed torch does.
extern bool e4m3fn_saturates;

}  // namespace paramkit::cpu
