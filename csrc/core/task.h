// One write, ready to run: the single descriptor that every front-end ends in and every kernel starts
// from. Nothing here knows of torch: pointers, sizes and byte strides only.
#pragma once

#include <cstdint>
#include <vector>

namespace paramkit {

// One loop of a write. Strides are in bytes; a source stride of 0 repeats the source.
struct Dim {
  int64_t size;
  int64_t dst;
  int64_t src;
};

// What a kernel has to do, decided once by classify().
enum class Family : uint8_t {
  Copy,       // one contiguous run on both sides
  Rows,       // loops around a contiguous run
  Transpose,  // elements: the destination's last loop is dense, an earlier loop is dense in the source
  General,    // elements, any strides
  Fill,       // one source element, repeated
};
inline constexpr int kFamilies = 5;
inline constexpr const char* kFamilyNames[kFamilies] = {"copy", "rows", "transpose", "general", "fill"};

// A write is `rank` nested loops (outermost first, in a pool of Dim shared by the whole list) around
// a run of `run` bytes that is contiguous in the destination, and in the source unless it is a Fill.
// 40 bytes, so that a list of a thousand small tensors stays in the L1 and L2 caches.
struct Task {
  char* dst;
  const char* src;
  int64_t run;
  uint32_t dims;  // index of the first loop in the pool
  uint8_t rank;
  uint8_t width;  // bytes of one element: 1, 2, 4, 8 or 16
  Family family;
  int64_t units;  // pieces that threads may take separately, see unit_bytes()
};

// torch allows 64 dimensions in an iterated operation; the front-end sends larger ones elsewhere.
inline constexpr int kMaxRank = 64;

// Runs longer than this are cut into blocks of kBlock bytes, loops over elements into kLane elements,
// transposes into square tiles: the units of the partition.
inline constexpr int64_t kBlock = 16 << 10;
inline constexpr int64_t kLane = 1024;
inline constexpr int64_t kTile = 64;

inline bool is_element(int64_t run) { return run == 1 || run == 2 || run == 4 || run == 8 || run == 16; }

// A list of writes in the order they were asked for.
struct Program {
  std::vector<Task> tasks;
  std::vector<Dim> dims;
  int64_t bytes = 0;  // of all destinations
  int64_t families[kFamilies] = {};

  void clear() {
    tasks.clear();
    dims.clear();
    bytes = 0;
    for (int64_t& n : families) n = 0;
  }

  // Both sides contiguous, `bytes` long, elements of `width` bytes. The commonest write by far.
  void add_contiguous(void* dst, const void* src, int64_t bytes, int width);

  // A strided write: `rank` loops in any order, strides in bytes. Adds nothing when a size is 0. False,
  // and nothing added, if two steps of the loops may reach one element of the destination.
  bool add(void* dst, const void* src, int width, const Dim* dims, int rank);
};

}  // namespace paramkit
