// How work is spread over torch's threads: the kernels, and the looking at long lists before them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstddef>

#include "core/task.h"

namespace paramkit {

// Shorter lists stay in a cache between two calls: nothing is gained by fetching their tensors ahead, and
// less by a second thread than it costs to wake it.
inline constexpr size_t kLongList = 4096;

// The threads that a call may use.
inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Calls body(first, last) for pieces of [0, n), on all threads if n is a long list. The body may look at
// Python objects, since the caller keeps the GIL meanwhile, but may not touch their reference counts.
template <class Body>
void in_pieces(size_t n, Body body) {
  const auto pieces = static_cast<size_t>(threads());
  if (n <= kLongList || pieces == 1) return body(size_t{0}, n);
  at::parallel_for(0, static_cast<int64_t>(pieces), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      body(n * i / pieces, n * (i + 1) / pieces);
    }
  });
}

// Longer work gives up the GIL; for shorter work giving it up and taking it back costs more when another
// thread wants it.
inline constexpr int64_t kReleaseGil = 1 << 20;

// Runs the tasks [first, last) with torch's threads, the GIL released if it is held and the work is
// long. `disjoint`: the caller knows that no task writes what another reads or writes; otherwise it is
// looked at, and tasks that share memory run in order.
void run_tasks(const Program& program, size_t first, size_t last, bool disjoint);

}  // namespace paramkit
