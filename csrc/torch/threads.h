// How work is spread over torch's threads: the kernels, and the looking at long lists before them.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/task.h"
#include "torch/tensors.h"

namespace paramkit {

// Shorter lists stay in a cache between two calls: nothing is gained by fetching their tensors ahead, and
// less by a second thread than it costs to wake it.
inline constexpr size_t kLongList = 4096;

// The threads that a call may use.
inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// How many pieces a list of `n` tensors is looked at in.
inline size_t pieces_of(size_t n) { return n > kLongList ? static_cast<size_t>(threads()) : 1; }

// Calls body(piece, first, last) for `pieces` pieces of [0, n), each on a thread. The body may look at Python
// objects, since the caller keeps the GIL meanwhile, but may not touch reference counts, of tensors neither:
// they count for their Python objects too.
template <class Body>
void in_pieces(size_t n, size_t pieces, Body body) {
  if (pieces == 1) return body(size_t{0}, size_t{0}, n);
  at::parallel_for(0, static_cast<int64_t>(pieces), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      body(i, n * i / pieces, n * (i + 1) / pieces);
    }
  });
}

// Raises the version counters of impl(i) for i in [0, n).
template <class Impl>
void bump_versions(size_t n, Impl impl) {
  const bool inference = c10::InferenceMode::is_enabled();  // only then may inference tensors be written
  in_pieces(n, pieces_of(n), [&](size_t, size_t first, size_t last) {
    const c10::InferenceMode as_the_caller(inference);
    // A counter that no cache holds stalls all that comes behind it, since its increment is locked.
    constexpr size_t kStep = 8;
    const size_t fetched = n > kLongList ? last - std::min(last - first, 2 * kStep) : 0;
    for (size_t i = first; i < last; ++i) {
      if (i < fetched) {
        __builtin_prefetch(&impl(i + 2 * kStep)->version_counter());
        prefetch(impl(i + kStep)->version_counter());
      }
      impl(i)->bump_version();
    }
  });
}

// Longer work gives up the GIL; for shorter work giving it up and taking it back costs more when another
// thread wants it.
inline constexpr int64_t kReleaseGil = 1 << 20;

// While there is one on this thread, the GIL is not given up. In a call of torch's that its caller makes
// with the GIL, under a lock of his perhaps, another thread would take the GIL and wait for that lock.
class KeepGil {
 public:
  KeepGil() : before_(kept()) { kept() = true; }
  ~KeepGil() { kept() = before_; }
  KeepGil(const KeepGil&) = delete;
  KeepGil& operator=(const KeepGil&) = delete;
  static bool& kept() {
    static thread_local bool value = false;
    return value;
  }

 private:
  bool before_;
};

// Gives up the GIL for a while, if it is held and that is wanted.
class ReleaseGil {
 public:
  explicit ReleaseGil(bool wanted);
  ~ReleaseGil();
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  void* state_;  // PyThreadState*
};

// Runs the tasks [first, last) with torch's threads, the GIL released if it is held and the work is
// long. `disjoint`: the caller knows that no task writes what another reads or writes; otherwise it is
// looked at, and tasks that share memory run in order.
void run_tasks(const Program& program, size_t first, size_t last, bool disjoint);

// For each task, whether its destination holds what its source says: cpu::equal on torch's threads.
std::vector<char> compare_tasks(const Program& program);

// Swaps the two sides of each task: cpu::exchange on torch's threads.
void exchange_tasks(const Program& program);

// As run_tasks, whatever CPU tensors stand for.
void run_on_host(const Program& program, size_t first, size_t last, bool disjoint);

}  // namespace paramkit
