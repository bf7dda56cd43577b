// Packs a program for the CUDA kernels: plain C++, no CUDA, no torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/task.h"
#include "cuda/packet.h"

namespace paramkit::cuda {

// What of a device decides how work is cut.
struct Machine {
  int multiprocessors = 1;
  bool e4m3fn_saturates = true;
};

// One launch.
struct Packet {
  std::vector<uint64_t> words;  // the packet, aligned
  uint64_t blocks = 0;

  const char* data() const { return reinterpret_cast<const char*>(words.data()); }
  size_t size() const { return words.size() * sizeof(uint64_t); }
};

// Whether the kernels can do a write with these addresses: elements that are converted or filled must be
// aligned, as tensors are, unless they are views of foreign memory.
inline bool takes(const void* dst, const void* src, Type to, Type from, bool fill) {
  const auto aligned = [](const void* p, int64_t width) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(width) == 0;
  };
  return (to == from && !fill) || (aligned(dst, width_of(to)) && (src == nullptr || aligned(src, width_of(from))));
}

// Whether a write's loops repeat one element of the source.
inline bool one_element(const Dim* dims, int rank) {
  return std::all_of(dims, dims + rank, [](const Dim& d) { return d.src == 0 || d.size == 1; });
}

// Packs the tasks [first, last), of which none may write what another reads or writes, into packets of at
// most `most` bytes each, if one task fits.
std::vector<Packet> pack(const Program& program, size_t first, size_t last, const Machine& machine,
                         size_t most = SIZE_MAX);

// The bytes that a block moves when `total` bytes are to be moved in all.
int64_t block_bytes(int64_t total, const Machine& machine);

Divisor divisor_of(uint32_t size);

}  // namespace paramkit::cuda
