#include "core/classify.h"

#include <algorithm>

namespace paramkit {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t product(const Dim* dims, int n) {
  int64_t all = 1;
  for (int i = 0; i < n; ++i) all *= dims[i].size;
  return all;
}

// Loops around runs: a run longer than four blocks may be shared by several threads.
int64_t run_blocks(const Task& task) { return task.run > 4 * kBlock ? ceil_div(task.run, kBlock) : 1; }

// Moves the loop in which the source is dense next to the innermost one, where the tile is taken.
bool order_transpose(int64_t element, Dim* dims, int rank) {
  if (rank < 2 || dims[rank - 1].dst != element || dims[rank - 1].src == 0) return false;
  for (int i = rank - 2; i >= 0; --i) {
    if (dims[i].src != element) continue;
    std::rotate(dims + i, dims + i + 1, dims + rank - 1);
    return true;
  }
  return false;
}

}  // namespace

void classify(Task& task, Dim* dims, int rank) {
  const bool fill = std::all_of(dims, dims + rank, [](const Dim& d) { return d.src == 0; });
  task.run = task.width;
  if (rank > 0) {
    const Dim& last = dims[rank - 1];
    if (last.dst == task.width && (fill || last.src == task.width)) {
      task.run *= last.size;
      --rank;
    }
  }
  task.rank = static_cast<uint8_t>(rank);
  if (fill && (rank > 0 || task.run > task.width)) {
    task.family = Family::Fill;
  } else if (rank == 0) {
    task.family = Family::Copy;
  } else if (!is_element(task.run)) {
    task.family = Family::Rows;
  } else {
    task.family = order_transpose(task.run, dims, rank) ? Family::Transpose : Family::General;
  }

  if (rank == 0) {
    task.units = run_blocks(task);
  } else if (task.family == Family::Transpose) {
    task.units = product(dims, rank - 2) * ceil_div(dims[rank - 2].size, kTile) * ceil_div(dims[rank - 1].size, kTile);
  } else if (is_element(task.run)) {
    task.units = product(dims, rank - 1) * ceil_div(dims[rank - 1].size, kLane);
  } else {
    task.units = product(dims, rank) * run_blocks(task);
  }
}

int64_t unit_bytes(const Task& task, const Dim* dims) {
  if (task.family == Family::Transpose) {
    const Dim* tile = dims + task.rank - 2;
    return task.run * std::min(tile[0].size, kTile) * std::min(tile[1].size, kTile);
  }
  if (task.rank > 0 && is_element(task.run)) return task.run * std::min(dims[task.rank - 1].size, kLane);
  return run_blocks(task) > 1 ? kBlock : task.run;
}

}  // namespace paramkit
