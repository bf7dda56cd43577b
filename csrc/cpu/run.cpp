#include "cpu/run.h"

#include <cstdlib>
#include <cstring>

#include "cpu/capability.h"

namespace paramkit::cpu {

int64_t stream_bytes() {
  static const int64_t bytes = [] {
    const char* text = std::getenv("PARAMKIT_STREAM_BYTES");
    return text != nullptr ? std::atoll(text) : int64_t{32} << 20;
  }();
  return bytes;
}

void run(const Program& program, size_t first, size_t last, int threads, Parallel parallel) {
  const Kernels& kernels = active();
  const bool stream = program.bytes >= stream_bytes();
  if (threads <= 1 || program.bytes < kParallelBytes) {
    kernels.run(program, {first, 0}, {last, 0}, stream);
    return;
  }
  struct Context {
    const Program* program;
    const Kernels* kernels;
    std::vector<Cut> cuts;
    bool stream;
  } context{&program, &kernels, {}, stream};
  partition(program, first, last, threads, context.cuts);
  parallel(
      threads,
      [](void* opaque, int i) {
        const Context& c = *static_cast<Context*>(opaque);
        c.kernels->run(*c.program, c.cuts[static_cast<size_t>(i)], c.cuts[static_cast<size_t>(i) + 1], c.stream);
      },
      &context);
}

bool equal(const Program& program, const Task& task) {
  const Dim* dims = program.dims.data() + task.dims;
  int64_t index[kMaxRank] = {};
  const char* dst = task.dst;
  const char* src = task.src;
  while (true) {
    if (task.family == Family::Fill) {
      for (int64_t i = 0; i < task.run; i += task.width) {
        if (std::memcmp(dst + i, src, task.width) != 0) return false;
      }
    } else if (std::memcmp(dst, src, static_cast<size_t>(task.run)) != 0) {
      return false;
    }
    int i = task.rank - 1;
    for (; i >= 0; --i) {
      dst += dims[i].dst;
      src += dims[i].src;
      if (++index[i] < dims[i].size) break;
      index[i] = 0;
      dst -= dims[i].size * dims[i].dst;
      src -= dims[i].size * dims[i].src;
    }
    if (i < 0) return true;
  }
}

}  // namespace paramkit::cpu
