// The kernels themselves, sent too far: what a wrong length in a task would do.
#include <cstdint>

#include "core/task.h"
#include "cpu/capability.h"
#include "cpu/run.h"

// Copies n + 1 bytes. 0 if the machine has no such instruction set.
extern "C" __attribute__((visibility("default"))) int32_t canary_kernel(const char* capability, char* dst,
                                                                        const char* src, int64_t n, int32_t past) {
  using namespace paramkit;
  if (!cpu::choose(capability)) return 0;
  cpu::set_stream_bytes(past != 0 ? 0 : int64_t{1} << 62);
  Program program;
  program.add_contiguous(dst, src, n + 1, 1);
  cpu::run(program, 0, 1, 1, nullptr);
  return 1;
}
