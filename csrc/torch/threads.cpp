#include "torch/threads.h"

#include <Python.h>
#include <unistd.h>

#include "core/classify.h"
#include "core/overlap.h"
#include "cpu/equal.h"
#include "cpu/exchange.h"
#include "cpu/run.h"
#include "torch/devices.h"

namespace paramkit {

namespace {

void parallel(int n, void (*body)(void*, int), void* context) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
  });
}

}  // namespace

ReleaseGil::ReleaseGil(bool wanted)
    : state_(wanted && !KeepGil::kept() && PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}

// While the interpreter is on its way out, Python before 3.14 ends a thread that asks for the GIL by unwinding its
// stack, and a stack of C++ that is unwound so ends the process. The thread stops here instead, as in Python 3.14.
// Nothing else leaves that call by an exception. (Catching abi::__forced_unwind& binds a reference to null: undefined.)
ReleaseGil::~ReleaseGil() {
  if (state_ == nullptr) return;
  try {
    PyEval_RestoreThread(static_cast<PyThreadState*>(state_));
  } catch (...) {
    while (true) pause();
  }
}

std::vector<char> compare_tasks(const Program& program) {
  const ReleaseGil released(program.bytes >= kReleaseGil);
  return cpu::equal(program, threads(), parallel);
}

void exchange_tasks(const Program& program) {
  const ReleaseGil released(program.bytes >= kReleaseGil);
  cpu::exchange(program, threads(), parallel);
}

void run_tasks(const Program& program, size_t first, size_t last, bool disjoint) {
  if (devices::kernels_emulated() && devices::take_all(program, first, last)) {
    return devices::run(program, first, last, 0, disjoint);
  }
  run_on_host(program, first, last, disjoint);
}

void run_on_host(const Program& program, size_t first, size_t last, bool disjoint) {
  if (first == last) return;
  const int available = threads();
  const ReleaseGil released(program.bytes >= kReleaseGil);
  if (available == 1 || program.bytes < cpu::kParallelBytes || last - first == 1 || disjoint ||
      !share_memory(program, first, last)) {
    return cpu::run(program, first, last, available, parallel);
  }
  // In order: large tasks on all threads, small ones on this one.
  const auto large = [&](size_t t) {
    const Task& task = program.tasks[t];
    return task.units * unit_bytes(task, program.dims.data() + task.dims) >= cpu::kParallelBytes;
  };
  for (size_t next = first; first < last; first = next) {
    const bool alone = large(first);
    for (++next; !alone && next < last && !large(next);) ++next;
    cpu::run(program, first, next, alone ? available : 1, parallel);
  }
}

}  // namespace paramkit
