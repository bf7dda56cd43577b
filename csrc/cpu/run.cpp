#include "cpu/run.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

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

namespace {

// Whether an element of `type` is NaN; of types that have none, no.
bool is_nan(Type type, const char* element) {
  if (type == Type::Float64) {
    double value;
    std::memcpy(&value, element, 8);
    return std::isnan(value);
  }
  const bool floating = type >= Type::Float32 && type <= Type::Float8E8M0FNU;
  if (!floating) return false;
  float value;
  if (type == Type::Float32) {
    std::memcpy(&value, element, 4);
  } else {
    active().cast(Type::Float32, type, reinterpret_cast<char*>(&value), element, 1);
  }
  return std::isnan(value);
}

// One run of a task, by blocks.
bool equal_run(const Task& task, const char* dst, const char* src) {
  const int64_t width = task.width(), n = task.run / width;
  if (task.family == Family::Fill) {
    char element[16];
    if (task.casts()) {
      active().cast(task.to, task.from, element, src, 1);
      src = element;
    }
    for (int64_t i = 0; i < n; ++i) {
      if (std::memcmp(dst + i * width, src, static_cast<size_t>(width)) != 0 &&
          !(task.casts() && is_nan(task.to, dst + i * width) && is_nan(task.to, src))) {
        return false;
      }
    }
    return true;
  }
  if (!task.casts()) return std::memcmp(dst, src, static_cast<size_t>(task.run)) == 0;
  constexpr int64_t kElements = 512;
  char block[kElements * 8];
  for (int64_t i = 0; i < n; i += kElements) {
    const int64_t now = std::min(kElements, n - i);
    active().cast(task.to, task.from, block, src + i * task.src_width(), now);
    const char* there = dst + i * width;
    if (std::memcmp(there, block, static_cast<size_t>(now * width)) == 0) continue;
    for (int64_t e = 0; e < now * width; e += width) {
      if (std::memcmp(there + e, block + e, static_cast<size_t>(width)) != 0 &&
          !(is_nan(task.to, there + e) && is_nan(task.to, block + e))) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace

bool equal(const Program& program, const Task& task) {
  const Dim* dims = program.dims.data() + task.dims;
  int64_t index[kMaxRank] = {};
  const char* dst = task.dst;
  const char* src = task.src;
  while (true) {
    if (!equal_run(task, dst, src)) return false;
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
