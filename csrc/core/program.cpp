#include <cstddef>

#include "core/classify.h"
#include "core/normalize.h"
#include "core/task.h"

namespace paramkit {

bool Program::add(void* dst, const void* src, Type to, Type from, const Dim* loops, int rank) {
  Dim local[kMaxRank];
  for (int i = 0; i < rank; ++i) local[i] = loops[i];
  rank = normalize(local, rank);
  if (rank < 0) return true;
  if (!injective(local, rank, static_cast<int>(width_of(to)))) return false;

  Task task;
  task.dst = static_cast<char*>(dst);
  task.src = static_cast<const char*>(src);
  task.dims = static_cast<uint32_t>(dims.size());
  task.to = to == from ? bytes_of_width(width_of(to)) : to;
  task.from = to == from ? task.to : from;
  task.number = false;
  classify(task, local, rank);
  dims.insert(dims.end(), local, local + task.rank);
  tasks.push_back(task);
  int64_t size = task.run;
  for (int i = 0; i < task.rank; ++i) size *= local[i].size;
  bytes += size;
  ++families[static_cast<int>(task.family)];
  casts += task.casts();
  return true;
}

void Program::append(const Program& other) {
  const std::size_t before = tasks.size();
  const auto loops = static_cast<uint32_t>(dims.size());
  tasks.insert(tasks.end(), other.tasks.begin(), other.tasks.end());
  for (std::size_t t = before; t < tasks.size(); ++t) tasks[t].dims += loops;
  dims.insert(dims.end(), other.dims.begin(), other.dims.end());
  bytes += other.bytes;
  for (int f = 0; f < kFamilies; ++f) families[f] += other.families[f];
  casts += other.casts;
}

}  // namespace paramkit
