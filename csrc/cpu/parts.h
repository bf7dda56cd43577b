// Tasks cut into boxes, for work that is not a write: comparing, exchanging.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/task.h"
#include "cpu/run.h"

namespace paramkit::cpu {

// What is converted or rearranged on the way goes through a block of this size, which the L2 cache holds
// beside the other side's.
inline constexpr int64_t kScratch = 128 << 10;

// Threads take parts of about this size: small enough that the last one does not wait long.
inline constexpr int64_t kPart = 4 << 20;

// A part of a task: the same loops, of other sizes and starts.
struct Part {
  size_t task;
  char* dst;
  const char* src;
  int64_t run;                 // bytes of the destination
  std::vector<int64_t> sizes;  // of the loops

  int64_t bytes() const {
    int64_t n = run;
    for (int64_t size : sizes) n *= size;
    return n;
  }
};

inline const Dim* dims_of(const Program& program, const Part& part) {
  return program.dims.data() + program.tasks[part.task].dims;
}

inline Part whole(const Program& program, size_t t) {
  const Task& task = program.tasks[t];
  Part part{t, task.dst, task.src, task.run, {}};
  for (int i = 0; i < task.rank; ++i) part.sizes.push_back(program.dims[task.dims + static_cast<size_t>(i)].size);
  return part;
}

// Halves the largest loop until a part is at most `limit` bytes: a transpose is then a square. A run is cut
// only where no loop is left. Calls emit(Part&&) for each part.
template <class Emit>
void split(const Program& program, Part part, int64_t limit, Emit& emit) {
  if (part.bytes() <= limit) return emit(std::move(part));
  const Task& task = program.tasks[part.task];
  size_t loop = 0;
  for (size_t i = 1; i < part.sizes.size(); ++i) {
    if (part.sizes[i] > part.sizes[loop]) loop = i;
  }
  Part rest = part;
  if (!part.sizes.empty() && part.sizes[loop] > 1) {
    const Dim& dim = dims_of(program, part)[loop];
    const int64_t half = part.sizes[loop] / 2;
    part.sizes[loop] = half;
    rest.sizes[loop] -= half;
    rest.dst += half * dim.dst;
    rest.src += half * dim.src;
  } else {
    const int64_t half = part.run / task.width() / 2;
    if (half == 0) return emit(std::move(part));
    part.run = half * task.width();
    rest.run -= part.run;
    rest.dst += part.run;
    if (task.family != Family::Fill) rest.src += half * task.src_width();
  }
  split(program, std::move(part), limit, emit);
  split(program, std::move(rest), limit, emit);
}

// All tasks of a program in parts, which threads take until none is left.
class Parts {
 public:
  explicit Parts(const Program& program) {
    auto keep = [this](Part&& part) { parts_.push_back(std::move(part)); };
    for (size_t t = 0; t < program.tasks.size(); ++t) split(program, whole(program, t), kPart, keep);
  }

  // Calls body(part) for parts that no other thread has taken.
  template <class Body>
  void take(Body body) {
    // Small parts are taken many at once: the counter is shared.
    const size_t together = std::max<size_t>(1, std::min<size_t>(64, parts_.size() / 16));
    while (true) {
      const size_t first = next_.fetch_add(together, std::memory_order_relaxed);
      if (first >= parts_.size()) return;
      for (size_t p = first; p < std::min(parts_.size(), first + together); ++p) body(parts_[p]);
    }
  }

 private:
  std::vector<Part> parts_;
  std::atomic<size_t> next_{0};
};

// Calls job.work() on as many threads as a program of that size is worth.
template <class Job>
void on_threads(Job& job, const Program& program, int threads, Parallel parallel) {
  if (threads <= 1 || program.bytes < kParallelBytes) return job.work();
  parallel(threads, [](void* context, int) { static_cast<Job*>(context)->work(); }, &job);
}

// The loops of a copy between a block and memory that is compact in the order of its loops. The compact memory is
// the destination; the block is the source, by its own strides on the side `other`, with elements `width` apart
// in its run. Writes rank + 1 loops, the run last, and returns how many.
inline int compact_loops(const Program& program, const Part& block, int64_t Dim::* other, int64_t width, Dim* loops) {
  const Dim* dims = dims_of(program, block);
  const Task& task = program.tasks[block.task];
  const int rank = static_cast<int>(block.sizes.size());
  int64_t step = block.run;
  loops[rank] = {block.run / task.width(), task.width(), width};
  for (int i = rank - 1; i >= 0; --i) {
    loops[i] = {block.sizes[static_cast<size_t>(i)], step, dims[i].*other};
    step *= loops[i].size;
  }
  return rank + 1;
}

}  // namespace paramkit::cpu
