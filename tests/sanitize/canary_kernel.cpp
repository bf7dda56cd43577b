// The kernels themselves, sent where they must not write: what a wrong length in a task would do.
#include <sanitizer/asan_interface.h>

#include <cstdint>

#include "core/task.h"
#include "cpu/capability.h"
#include "cpu/run.h"

// Copies n + 1 bytes; or, `streaming`, n bytes by the stores that otherwise go past the cache, with a forbidden
// cache line on the way, which only those reach. 0 if the machine has no such instruction set.
extern "C" __attribute__((visibility("default"))) int32_t canary_kernel(const char* capability, char* dst,
                                                                        const char* src, int64_t n, int32_t streaming) {
  using namespace paramkit;
  if (!cpu::choose(capability)) return 0;
  cpu::set_stream_bytes(streaming != 0 ? 0 : int64_t{1} << 62);
  if (streaming != 0) __asan_poison_memory_region(dst + n / 2, 64);
  Program program;
  program.add_contiguous(dst, src, streaming != 0 ? n : n + 1, 1);
  cpu::run(program, 0, 1, 1, nullptr);
  return 1;
}
