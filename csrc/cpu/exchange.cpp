#include "cpu/exchange.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/capability.h"
#include "cpu/parts.h"

namespace paramkit::cpu {

namespace {

class Exchange {
 public:
  explicit Exchange(const Program& program) : program_(program), kernels_(active()), parts_(parts_of(program)) {}

  // Takes parts until none is left.
  void work() {
    const std::unique_ptr<char[]> scratch(new char[kScratch]);
    Program step;
    auto swap = [&](Part&& block) { swap_block(block, scratch.get(), step); };
    const size_t together = std::max<size_t>(1, std::min<size_t>(64, parts_.size() / 16));
    while (true) {
      const size_t first = next_.fetch_add(together, std::memory_order_relaxed);
      if (first >= parts_.size()) return;
      for (size_t p = first; p < std::min(parts_.size(), first + together); ++p) {
        split(program_, parts_[p], kScratch, swap);
      }
    }
  }

 private:
  void swap_block(const Part& block, char* scratch, Program& step) const {
    const Task& task = program_.tasks[block.task];
    const Dim* dims = dims_of(program_, block);
    const int rank = static_cast<int>(block.sizes.size());
    Dim loops[kMaxRank + 1];
    char* const src = const_cast<char*>(block.src);
    // scratch <- destination
    run(step, scratch, block.dst, task.to, loops, compact_loops(program_, block, &Dim::dst, task.width(), loops));
    // destination <- source
    for (int i = 0; i < rank; ++i) loops[i] = {block.sizes[static_cast<size_t>(i)], dims[i].dst, dims[i].src};
    loops[rank] = {block.run / task.width(), task.width(), task.width()};
    run(step, block.dst, src, task.to, loops, rank + 1);
    // source <- scratch
    const int n = compact_loops(program_, block, &Dim::src, task.width(), loops);
    for (int i = 0; i < n; ++i) std::swap(loops[i].dst, loops[i].src);
    run(step, src, scratch, task.to, loops, n);
  }

  void run(Program& step, char* dst, const char* src, Type type, const Dim* loops, int n) const {
    step.clear();
    step.add(dst, src, type, type, loops, n);
    kernels_.run(step, {0, 0}, {step.tasks.size(), 0}, Stream{false, false, false});
  }

  const Program& program_;
  const Kernels& kernels_;
  const std::vector<Part> parts_;
  std::atomic<size_t> next_{0};
};

}  // namespace

void exchange(const Program& program, int threads, Parallel parallel) {
  Exchange all(program);
  if (threads <= 1 || program.bytes < kParallelBytes) return all.work();
  parallel(threads, [](void* context, int) { static_cast<Exchange*>(context)->work(); }, &all);
}

}  // namespace paramkit::cpu
