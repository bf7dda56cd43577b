#include "cpu/run.h"

#include <atomic>
#include <cstdlib>

#include "cpu/capability.h"

namespace paramkit::cpu {

namespace {

int64_t default_stream_bytes() {
  const char* text = std::getenv("PARAMKIT_STREAM_BYTES");
  return text != nullptr ? std::atoll(text) : int64_t{32} << 20;
}

std::atomic<int64_t>& threshold() {
  static std::atomic<int64_t> bytes{default_stream_bytes()};
  return bytes;
}

}  // namespace

bool e4m3fn_saturates = true;

int64_t stream_bytes() { return threshold().load(std::memory_order_relaxed); }

void set_stream_bytes(int64_t bytes) { threshold() = bytes < 0 ? default_stream_bytes() : bytes; }

void run(const Program& program, size_t first, size_t last, int threads, Parallel parallel) {
  const Kernels& kernels = active();
  const int64_t limit = stream_bytes();
  const Stream stream{program.bytes >= limit, program.bytes / 4 >= limit, program.bytes >= limit / 8};
  if (threads <= 1 || program.bytes < kParallelBytes) {
    kernels.run(program, {first, 0}, {last, 0}, stream);
    return;
  }
  struct Context {
    const Program* program;
    const Kernels* kernels;
    std::vector<Cut> cuts;
    Stream stream;
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

}  // namespace paramkit::cpu
