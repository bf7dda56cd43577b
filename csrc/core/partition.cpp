#include "core/partition.h"

#include <algorithm>

#include "core/classify.h"

namespace paramkit {

namespace {

// Decoding a descriptor and missing the cache on it costs about as much as moving this many bytes.
constexpr int64_t kTaskOverhead = 256;

int64_t cost(const Program& program, const Task& task) {
  return kTaskOverhead + task.units * unit_bytes(task, program.dims.data() + task.dims);
}

}  // namespace

void partition(const Program& program, size_t first, size_t last, int pieces, std::vector<Cut>& cuts) {
  static thread_local std::vector<int64_t> before;  // the cost of the tasks before each
  before.clear();
  int64_t total = 0;
  for (size_t t = first; t < last; ++t) {
    before.push_back(total);
    total += cost(program, program.tasks[t]);
  }
  cuts.clear();
  cuts.push_back({first, 0});
  for (int piece = 1; piece < pieces; ++piece) {
    const auto target = static_cast<int64_t>(static_cast<double>(total) * piece / pieces);
    const auto after = std::upper_bound(before.begin(), before.end(), target);
    const size_t t = first + static_cast<size_t>(after - before.begin()) - 1;
    const Task& task = program.tasks[t];
    const int64_t unit = unit_bytes(task, program.dims.data() + task.dims);
    cuts.push_back({t, std::clamp<int64_t>((target - *(after - 1)) / std::max<int64_t>(unit, 1), 0, task.units)});
  }
  cuts.push_back({last, 0});
}

}  // namespace paramkit
