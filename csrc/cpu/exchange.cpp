#include "cpu/exchange.h"

#include <memory>
#include <utility>

#include "cpu/capability.h"
#include "cpu/parts.h"

namespace paramkit::cpu {

namespace {

class Exchange {
 public:
  explicit Exchange(const Program& program) : program_(program), kernels_(active()), parts_(program) {}

  // Takes parts until none is left.
  void work() {
    const std::unique_ptr<char[]> scratch(new char[kScratch]);
    Program step;
    auto swap = [&](Part&& block) { swap_block(block, scratch.get(), step); };
    parts_.take([&](const Part& part) { split(program_, part, kScratch, swap); });
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
  Parts parts_;
};

}  // namespace

void exchange(const Program& program, int threads, Parallel parallel) {
  Exchange all(program);
  on_threads(all, program, threads, parallel);
}

}  // namespace paramkit::cpu
