// The CUDA kernels: one launch does a whole packet, whatever the mix of jobs in it (cuda/packet.h).
//
// Compiled twice: by nvcc (cuda/launch.cu), and as C++ for the host (tests/emulate.cpp), behind a shim that
// runs the threads of a block one after the other. So nothing here but plain C++, threadIdx, blockIdx,
// __syncthreads, __byte_perm and __funnelshift_r.
//
// One rule on memory, as on the CPU: nothing outside the destination's elements is written, and nothing
// outside the source's elements is read.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/packet.h"

#define PARAMKIT_FN __device__ __forceinline__

namespace paramkit::cuda {

#define PARAMKIT_STATIC static __device__ __forceinline__
#include "core/numbers.inc"
#undef PARAMKIT_STATIC

// Bytes in registers: one load or store of 1, 2, 4, 8 or 16 of them.
struct alignas(16) Raw {
  uint32_t w[4];
};
struct alignas(8) Raw8 {
  uint32_t w[2];
};

// The threads that do a job together: a block or a warp.
struct Group {
  uint32_t rank, size;
};

// Loads or stores that a thread has under way at once: 16 KiB a block, which with three blocks is
// the 48 KiB that a multiprocessor of Hopper wants in flight.
constexpr int kUnroll = 4;

#include "cuda/kernels/move.cuh"
//
#include "cuda/kernels/convert.cuh"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/flat.cuh"
#include "cuda/kernels/tiles.cuh"

PARAMKIT_FN void run_job(Kind kind, const char* job, Group group, uint32_t part, uint32_t parts, bool saturates) {
  switch (kind) {
    case Kind::Copy: return run_copy(*reinterpret_cast<const CopyJob*>(job), group, part, parts);
    case Kind::Rows: return run_rows(*reinterpret_cast<const RowsJob*>(job), group, part, parts);
    default: break;
  }
  const auto& flat = *reinterpret_cast<const FlatJob*>(job);
  if (flat.load == 0) return run_fill(flat, group, part, parts);
  if (flat.to == flat.from && flat.repeat == 0) return run_moves(flat, group, part, parts);
  run_casts(flat, group, part, parts, saturates);
}

// The last section that begins at or before a block.
PARAMKIT_FN const Section& find_section(const char* packet, uint64_t block) {
  const auto* sections = reinterpret_cast<const Section*>(packet + sizeof(Header));
  uint32_t low = 0, high = reinterpret_cast<const Header*>(packet)->sections;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (sections[middle].first <= block ? low : high) = middle;
  }
  return sections[low];
}

PARAMKIT_FN void run_block(const char* packet, uint32_t block, uint32_t thread, char* shared) {
  const Section section = find_section(packet, block);
  const bool saturates = reinterpret_cast<const Header*>(packet)->e4m3fn_saturates != 0;
  const char* jobs = packet + section.jobs;
  const uint32_t at = block - section.first;
  if (section.each != 0) {
    const Group warp{thread % kWarp, kWarp};
    const uint32_t begin = at * section.each;
    const uint32_t end = section.count - begin < section.each ? section.count : begin + section.each;
    for (uint32_t j = begin + thread / kWarp; j < end; j += kWarps) {
      run_job(section.kind, jobs + uint64_t{j} * section.stride, warp, 0, 1, saturates);
    }
    return;
  }
  const uint32_t part = at % section.blocks;
  const char* job = jobs + uint64_t{at / section.blocks} * section.stride;
  if (section.kind == Kind::Tiles) {
    return run_tile(*reinterpret_cast<const TilesJob*>(job), thread, part, shared, saturates);
  }
  run_job(section.kind, job, {thread, kThreads}, part, section.blocks, saturates);
}

}  // namespace paramkit::cuda
