// Writes that are not the CPU's alone: the tasks for one device, or the transfers to it or from it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/task.h"
#include "torch/devices.h"
#include "torch/transfer.h"

namespace paramkit {

class Elsewhere {
 public:
  // Homes of the two sides, as of devices::home(): one is a device's, the other that too or the host's.
  Elsewhere(int dst_home, int src_home);

  bool serves(int dst_home, int src_home) const { return dst_home == dst_home_ && src_home == src_home_; }
  bool transfers() const { return transfer_.has_value(); }

  // Adds a write, strides in bytes. `number`: the source is a number in host memory, to be taken along. False,
  // and nothing added, if the kernels do not take it: two steps of the loops may reach one element, or
  // elements that are not aligned.
  bool add(char* dst, const char* src, Type to, Type from, const Dim* dims, int rank, bool number);

  // Of a device: for tasks that are known to be taken.
  Program& tasks() { return program_; }

  // What was added, with the addresses of both sides: one task a write, but for empty ones.
  const Program& writes() const { return transfer_ ? transfer_->writes() : program_; }
  size_t size() const { return writes().tasks.size(); }

  // Throws what a run would, as far as it can be known before anything is written.
  void check() const;

  // Runs the writes [first, last). On a device: in order where they share memory.
  void run(size_t first, size_t last, bool non_blocking) const;

  // For plans, whose writes are apart: keeps what a launch needs on the device, and runs it.
  void make_resident();
  void run_resident() const { resident_->run(); }

 private:
  int where() const { return dst_home_ == devices::kHost ? src_home_ : dst_home_; }

  int dst_home_, src_home_;
  Program program_;                   // of the device
  std::optional<Transfer> transfer_;  // or between it and the host
  std::optional<devices::Resident> resident_;
};

// The list of `all` for writes between these homes, made if there is none.
template <class List>
size_t index_of(std::vector<List>& all, int dst_home, int src_home) {
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].serves(dst_home, src_home)) return i;
  }
  all.emplace_back(dst_home, src_home);
  return all.size() - 1;
}

}  // namespace paramkit
