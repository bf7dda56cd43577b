#include "core/classify.h"

#include <algorithm>
#include <utility>

namespace paramkit {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t product(const Dim* dims, int n) {
  int64_t all = 1;
  for (int i = 0; i < n; ++i) all *= dims[i].size;
  return all;
}

// Loops around runs: a long run may be shared by several threads.
int64_t run_blocks(const Task& task) { return task.run > kLongRun ? ceil_div(task.run, kBlock) : 1; }

// A run of elements made of several loops: each begins where the one inside it ends.
struct Chain {
  int64_t Dim::*stride;  // of the side on which it is one run
  int64_t reach;         // bytes so far
  int64_t length = 1;    // elements so far
  int loops = 0;
  int members[kMaxChain] = {};  // innermost first

  // Takes the loop that continues the run, unless it is taken.
  bool extend(const Dim* dims, int rank, bool* taken) {
    if (loops == kMaxChain) return false;
    for (int i = rank - 1; i >= 0; --i) {
      if (taken[i] || dims[i].*stride != reach) continue;
      taken[i] = true;
      members[loops++] = i;
      reach *= dims[i].size;
      length *= dims[i].size;
      return true;
    }
    return false;
  }
};

// Runs longer than this gain nothing by another loop.
constexpr int64_t kLongChain = 1024;

// Puts the loops into the order that a Transpose wants. False if it is none, or not worth a tile.
bool order_transpose(Task& task, Dim* dims, int rank) {
  const int64_t src_element = task.run / task.width() * task.src_width();
  Chain along{&Dim::dst, task.run}, across{&Dim::src, src_element};
  bool taken[kMaxRank] = {};
  if (rank < 2 || dims[rank - 1].src == 0) return false;
  if (!along.extend(dims, rank, taken) || !across.extend(dims, rank, taken)) return false;
  // The shorter run first: a 3 x 3 kernel needs the channels more than the other side does.
  while (true) {
    Chain& shorter = along.length <= across.length ? along : across;
    Chain& longer = along.length <= across.length ? across : along;
    if (shorter.length < kLongChain && shorter.extend(dims, rank, taken)) continue;
    if (longer.length < kLongChain && longer.extend(dims, rank, taken)) continue;
    break;
  }

  Dim ordered[kMaxRank];
  int n = 0;
  for (int i = 0; i < rank; ++i) {
    if (!taken[i]) ordered[n++] = dims[i];
  }
  for (int i = across.loops; i-- > 0;) ordered[n++] = dims[across.members[i]];
  for (int i = along.loops; i-- > 0;) ordered[n++] = dims[along.members[i]];
  task.rank = static_cast<uint8_t>(rank);
  task.across = static_cast<uint8_t>(across.loops & 3);
  task.along = static_cast<uint8_t>(along.loops & 3);
  // Of shorter runs a register would mostly be empty.
  const bool full = along.length * task.run >= 16 && across.length * task.run >= 16;
  if (!full && pairs_of(task, ordered) == Pairs::None) return false;
  std::copy(ordered, ordered + n, dims);
  return true;
}

}  // namespace

Runs runs_of(const Task& task, const Dim* dims) {
  const Dim* along = dims + task.rank - task.along;
  return {product(along - task.across, task.across), product(along, task.along)};
}

Pairs pairs_of(const Task& task, const Dim* dims) {
  if (task.across != 1 || task.along != 1 || task.run > 8) return Pairs::None;
  const Dim &across = dims[task.rank - 2], &along = dims[task.rank - 1];
  if (along.size == 2 && across.dst == 2 * task.run) return Pairs::Zip;
  const int64_t src_element = task.run / task.width() * task.src_width();
  return across.size == 2 && along.src == 2 * src_element ? Pairs::Unzip : Pairs::None;
}

void classify(Task& task, Dim* dims, int rank) {
  const bool fill = std::all_of(dims, dims + rank, [](const Dim& d) { return d.src == 0; });
  task.run = task.width();
  task.across = task.along = 0;
  if (rank > 0) {
    const Dim& last = dims[rank - 1];
    if (last.dst == task.width() && (fill || last.src == task.src_width())) {
      task.run *= last.size;
      --rank;
    }
  }
  task.rank = static_cast<uint8_t>(rank);
  if (fill && (rank > 0 || task.run > task.width())) {
    task.family = Family::Fill;
  } else if (rank == 0) {
    task.family = Family::Copy;
  } else if (task.casts() ? task.run > task.width() : !is_element(task.run)) {
    task.family = Family::Rows;
  } else {
    // Short runs that are only moved are wider elements.
    if (!task.casts()) task.to = task.from = bytes_of_width(task.run);
    task.family = order_transpose(task, dims, rank) ? Family::Transpose : Family::General;
  }
  // An innermost loop of a few turns costs more to enter than to run.
  if (rank > 1 && task.family != Family::Transpose && dims[rank - 1].size < 8 &&
      dims[rank - 2].size > dims[rank - 1].size) {
    std::swap(dims[rank - 2], dims[rank - 1]);
  }

  if (rank == 0) {
    task.units = run_blocks(task);
  } else if (task.family == Family::Transpose) {
    const int64_t outer = product(dims, rank - task.across - task.along);
    const auto [across, along] = runs_of(task, dims);
    task.units = pairs_of(task, dims) != Pairs::None
                     ? outer * ceil_div(std::max(across, along), turns_of(2 * task.run))
                     : outer * ceil_div(across, kStripAcross) * ceil_div(along, kTileAlong / task.run);
  } else {
    task.units = product(dims, rank - 1) * ceil_div(dims[rank - 1].size, turns_of(task.run)) * run_blocks(task);
  }
}

int64_t unit_bytes(const Task& task, const Dim* dims) {
  int64_t bytes = task.run > kLongRun ? kBlock : task.run;
  if (task.family == Family::Transpose) {
    const auto [across, along] = runs_of(task, dims);
    bytes *= pairs_of(task, dims) != Pairs::None
                 ? 2 * std::min(std::max(across, along), turns_of(2 * task.run))
                 : std::min(across, kStripAcross) * std::min(along, kTileAlong / task.run);
  } else if (task.rank > 0) {
    bytes *= std::min(dims[task.rank - 1].size, turns_of(task.run));
  }
  return (bytes + bytes / task.width() * task.src_width()) / 2;
}

}  // namespace paramkit
