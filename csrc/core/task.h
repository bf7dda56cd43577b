// One write, ready to run: the single descriptor that every front-end ends in and every kernel starts
// from. Nothing here knows of torch: pointers, sizes and byte strides only.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtypes.h"

namespace paramkit {

// One loop of a write. Strides are in bytes; a source stride of 0 repeats the source.
struct Dim {
  int64_t size;
  int64_t dst;
  int64_t src;
};

// What a kernel has to do, decided once by classify(). Each works with and without a cast.
enum class Family : uint8_t {
  Copy,       // one contiguous run on both sides
  Rows,       // loops around runs that are contiguous on both sides
  Transpose,  // a run in the source crosses a run in the destination
  General,    // loops over elements, any strides
  Fill,       // one source element, repeated
};
inline constexpr int kFamilies = 5;
inline constexpr const char* kFamilyNames[kFamilies] = {"copy", "rows", "transpose", "general", "fill"};

// A write is `rank` nested loops (outermost first, in a pool of Dim shared by the whole list) around
// a run of `run` bytes that is contiguous in the destination, and in the source unless it is a Fill.
// The loops of a Transpose end in `across` loops that are one run of elements in the source, and then
// `along` loops that are one run in the destination; both in the order of that run, so that the 3 x 3
// taps and the input channels of a convolution make one long run, not nine short ones.
// 40 bytes, so that a list of a thousand small tensors stays in the L1 and L2 caches.
struct Task {
  char* dst;
  const char* src;
  int64_t run;    // bytes of the destination
  int64_t units;  // pieces that threads may take separately, see unit_bytes()
  uint32_t dims;  // index of the first loop in the pool
  uint8_t rank;
  Type to, from;  // equal where bytes are only moved
  Family family : 3;
  uint8_t across : 2, along : 2;
  bool number : 1;  // a Fill whose source is a number in host memory, wherever the destination is

  bool casts() const { return to != from; }
  int64_t width() const { return width_of(to); }
  int64_t src_width() const { return width_of(from); }
};
static_assert(sizeof(Task) == 40);

// torch allows 64 dimensions in an iterated operation; the front-end sends larger ones elsewhere.
inline constexpr int kMaxRank = 64;

// The units of the partition: runs longer than kLongRun are cut into blocks of kBlock bytes, loops
// around shorter ones into as many turns as make a block, transposes into strips of tiles.
inline constexpr int64_t kBlock = 16 << 10;
inline constexpr int64_t kLongRun = 4 * kBlock;

// Turns of the innermost loop in a unit.
inline constexpr int64_t turns_of(int64_t run) { return run < kBlock ? kBlock / run : 1; }

// The most loops that make one run of a transpose.
inline constexpr int kMaxChain = 3;

// A tile of a transpose: kTileAlong bytes of destination runs, two cache lines, by kTileAcross bytes of
// source runs, four. Strips are kStripAcross elements of the source runs long, so that the pages of as
// many destination runs stay in the TLB while the strips beside them follow. Measured with 4096 x 4096,
// 2 threads, as shares of the streaming copy, float32 / bfloat16 / uint8: 2 x 4 lines 0.78 / 0.85 /
// 0.96; 4 x 4 0.67 / 0.85 / 0.75; 2 x 8 0.79 / 0.81 / 0.92; without strips 2 x 4 0.69 / 0.75 / 0.79.
inline constexpr int64_t kTileAlong = 128;
inline constexpr int64_t kTileAcross = 256;
inline constexpr int64_t kStripAcross = 1024;

inline bool is_element(int64_t run) { return run == 1 || run == 2 || run == 4 || run == 8 || run == 16; }

inline Task contiguous_task(void* dst, const void* src, int64_t size, int64_t width) {
  Task task;
  task.dst = static_cast<char*>(dst);
  task.src = static_cast<const char*>(src);
  task.run = size;
  task.units = size > kLongRun ? (size + kBlock - 1) / kBlock : 1;
  task.dims = 0;
  task.rank = 0;
  task.to = task.from = bytes_of_width(width);
  task.family = Family::Copy;
  task.across = task.along = 0;
  task.number = false;
  return task;
}

// A list of writes in the order they were asked for.
struct Program {
  std::vector<Task> tasks;
  std::vector<Dim> dims;
  int64_t bytes = 0;  // of all destinations
  int64_t families[kFamilies] = {};
  int64_t casts = 0;  // how many of the tasks convert

  void clear() {
    tasks.clear();
    dims.clear();
    bytes = 0;
    for (int64_t& n : families) n = 0;
    casts = 0;
  }

  // Both sides contiguous, `size` bytes long, elements of `width` bytes, no cast. The commonest write by far.
  void add_contiguous(void* dst, const void* src, int64_t size, int64_t width) {
    tasks.push_back(contiguous_task(dst, src, size, width));
    bytes += size;
    ++families[static_cast<int>(Family::Copy)];
  }

  // A strided write: `rank` loops in any order, strides in bytes. Equal types are moved, whatever they
  // are. Adds nothing when a size is 0. False, and nothing added, if two steps of the loops may reach
  // one element of the destination.
  bool add(void* dst, const void* src, Type to, Type from, const Dim* dims, int rank);

  // The task that was added last fills with a number in host memory.
  void make_number() { tasks.back().number = true; }

  // Adds all writes of another program behind its own.
  void append(const Program& other);
};

}  // namespace paramkit
