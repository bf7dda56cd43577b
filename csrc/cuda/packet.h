// What a kernel is told: a packet of plain data, the same for the host that packs it (cuda/pack.cpp) and
// the device that reads it (cuda/kernels.cuh).
//
//   Header | Section, Section, ... | the jobs of the first section | the jobs of the next | ...
//
// A section holds jobs of one kind and one length. Its blocks follow one another: either `each` jobs share
// one block, a warp a job, or `blocks` blocks share one job.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace paramkit::cuda {

inline constexpr uint32_t kThreads = 256;  // of a block
inline constexpr uint32_t kWarp = 32;
inline constexpr uint32_t kWarps = kThreads / kWarp;

struct Header {
  uint32_t sections;
  uint32_t e4m3fn_saturates;  // what is too large for float8_e4m3fn becomes its largest value, not NaN
  uint64_t blocks;
};

enum class Kind : uint32_t {
  Copy,   // one contiguous run of bytes at any alignment
  Rows,   // loops around long runs of bytes at any alignment, a warp a run
  Flat,   // loops around groups of elements, aligned: strided moves, casts, fills
  Tiles,  // transposes through shared memory
};

struct Section {
  uint32_t first;   // the number of its first block
  uint32_t jobs;    // bytes from the beginning of the packet to its first job
  uint32_t count;   // jobs
  uint32_t stride;  // bytes from job to job
  uint32_t each;    // jobs that share a block; 0: all blocks below do one job
  uint32_t blocks;  // blocks that share a job
  Kind kind;
  uint32_t unused;
};
static_assert(sizeof(Section) == 32);

// n / size for n < 2**31 by a multiplication, as of Granlund and Montgomery.
struct Divisor {
  uint32_t size, magic, shift;
};

// One loop around what a job repeats. Strides in bytes.
struct Loop {
  Divisor by;
  uint32_t unused;
  int64_t dst, src;
};
static_assert(sizeof(Loop) == 32);

struct CopyJob {
  uint64_t dst, src, bytes;
};

// Loops (innermost first) follow each of these.
struct RowsJob {
  uint64_t dst, src, run;
  uint32_t n;      // pieces of all rows
  uint32_t rank;   // the innermost loop is that over the pieces of a row
  uint64_t piece;  // bytes
};

struct FlatJob {
  uint64_t dst;
  union {
    uint64_t src;
    uint8_t value[16];  // of a fill: elements over and over
  };
  uint32_t n;        // groups of all loops, below 2**31
  uint8_t rank;      // at least 1
  uint8_t load;      // bytes of a group in the source; 0: there is a value instead
  uint8_t store;     // and in the destination
  uint8_t repeat;    // of a group that is one element: its bytes, to be repeated until `store` is full; else 0
  Type to, from;     // equal: bytes are moved
  uint8_t elements;  // of a group: what is converted at once
  uint8_t head;      // elements before the first group and behind the last, of a job of one loop
  uint8_t tail;
  uint8_t unused[3];
};
static_assert(sizeof(FlatJob) == 40);

// `across` loops that are one run in the source, `along` loops that are one run in the destination.
struct TilesJob {
  uint64_t dst, src;
  uint32_t across, along;              // elements
  uint32_t tiles_across, tiles_along;  // `outer` of them are all tiles
  uint8_t width, src_width;            // bytes of an element
  Type to, from;
  uint8_t outer_loops, across_loops, along_loops;  // Loops in this order, each innermost first
  uint8_t aligned;                                 // kLoads and kStores
  uint32_t unused[2];
};
static_assert(sizeof(TilesJob) == 48);
inline constexpr uint8_t kLoads = 1, kStores = 2;  // whole cells may be loaded, stored

// A tile: kAcross elements that lie side by side in the source by kAlong that do in the destination, 16 KiB
// in all (32 x 128 floats), in cells of 4 bytes, or of an element where that is more. A warp reads or writes
// 32 cells in a row.
template <int W>
struct Tile {
  static constexpr int kCell = W < 4 ? 4 : W;
  static constexpr int kElements = kCell / W;  // of a cell
  static constexpr int kAcross = 32 * kElements;
  static constexpr int kAlong = 16384 / (kAcross * W);
  static constexpr int kPitch = kAlong / kElements + 1;  // cells; odd, so that a column meets every bank
  static constexpr int kBytes = kAcross * kPitch * kCell;
};
inline constexpr int tile_across(int width) { return width == 1 ? 128 : width == 2 ? 64 : 32; }
inline constexpr int tile_along(int width) { return width <= 4 ? 128 : width == 8 ? 64 : 32; }
static_assert(Tile<1>::kAcross == tile_across(1) && Tile<1>::kAlong == tile_along(1));
static_assert(Tile<2>::kAcross == tile_across(2) && Tile<2>::kAlong == tile_along(2));
static_assert(Tile<4>::kAcross == tile_across(4) && Tile<4>::kAlong == tile_along(4));
static_assert(Tile<8>::kAcross == tile_across(8) && Tile<8>::kAlong == tile_along(8));
static_assert(Tile<16>::kAcross == tile_across(16) && Tile<16>::kAlong == tile_along(16));

inline constexpr int kTileOffsets = 128;  // the most elements of a tile on either side
inline constexpr int kSharedBytes = Tile<16>::kBytes + 2 * kTileOffsets * 8;
static_assert(Tile<1>::kBytes <= Tile<16>::kBytes && Tile<2>::kBytes <= Tile<16>::kBytes &&
              Tile<4>::kBytes <= Tile<16>::kBytes && Tile<8>::kBytes <= Tile<16>::kBytes);

}  // namespace paramkit::cuda
