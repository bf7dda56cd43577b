// Bytes of a fuzzer as a list of writes. Every input is some list, so that nothing is thrown away; what the
// input has not is 0. Most lists are nests of loops as views make them; some have strides of any kind.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/task.h"

namespace paramkit::fuzz {

inline constexpr int kMostLoops = 6;
// Of one write: elements, and bytes from the first to the last of a side. Small ones are quick; one list in sixteen
// may be of several blocks, strips and units a task.
struct Limits {
  int64_t elements, bytes;
};
inline constexpr Limits kSmall = {3000, 24 << 10}, kLarge = {80000, 200 << 10};
inline constexpr int64_t kGuard = 64;  // in front of all that is written, and behind it

struct Write {
  Type to, from;
  int rank;
  Dim dims[kMostLoops];
  int64_t dst, src;            // where they begin, in bytes of their buffers
  int64_t dst_span, src_span;  // from the first to the last byte
  bool inside;                 // the source is in the buffer that is written
  bool nested;                 // loops as those of a view: no element of the destination comes twice
};

struct List {
  std::vector<Write> writes;
  int64_t dst_bytes = 2 * kGuard, src_bytes = 0;
  int pieces = 1;          // of the partition
  bool backwards = false;  // the last piece first
  int streams = 0;         // one bit for runs, fills and tiles
  int phase = 0;           // of both buffers against a cache line
  uint32_t seed = 0;       // of the bytes in them
};

class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  int64_t byte() { return at_ == end_ ? 0 : *at_++; }
  int64_t two() { return byte() | byte() << 8; }

  // Loop sizes: small ones mostly, and those at which kernels change their way.
  int64_t size() {
    static constexpr int64_t kEdges[] = {0,   1,   15,  16,  17,  31,  32,  33,  63,   64,   65,   66,   95,   96,  127,
                                         128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2049, 4099, 8200};
    constexpr int64_t kCount = sizeof(kEdges) / sizeof(kEdges[0]);
    const int64_t b = byte();
    if (b < 110) return 1 + b % 8;
    if (b < 180) return 1 + b % 36;
    if (b < 220) return 1 + 2 * (b - 180);
    return kEdges[(b - 220) % kCount];
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

// The types that are converted between; those in front of them are only moved.
inline Type converted(int64_t b) { return static_cast<Type>(static_cast<int>(Type::Float64) + b % (kTypes - 5)); }

// An order of the loops, innermost first.
inline void read_order(Reader& in, int rank, int* order) {
  for (int i = 0; i < rank; ++i) order[i] = rank - 1 - i;
  const int64_t b = in.byte();
  if (b % 3 == 0) return;
  for (int i = rank - 1; i > 0; --i) std::swap(order[i], order[in.byte() % (i + 1)]);
}

// The strides of one side, with now and then a gap between elements, or a row that is longer than needed.
inline int64_t read_strides(Reader& in, Write& write, int64_t Dim::* stride, int64_t width, int64_t most,
                            bool may_repeat) {
  int order[kMostLoops];
  read_order(in, write.rank, order);
  int64_t step = width, span = width;
  for (int i = 0; i < write.rank; ++i) {
    Dim& dim = write.dims[order[i]];
    const int64_t b = in.byte();
    dim.*stride = step;
    if (b >= 250) {
      dim.*stride = in.byte() * width;
      write.nested = write.nested && may_repeat;
    } else if (may_repeat && b >= 215) {
      dim.*stride = 0;
    } else if (b >= 180) {
      dim.*stride = step * (2 + b % 2);
    }
    // Too far apart: this loop takes one turn.
    if (span + (dim.size - 1) * (dim.*stride) > most) dim.size = 1;
    span += std::max<int64_t>(dim.size - 1, 0) * (dim.*stride);
    step = std::max(step, dim.*stride * std::max<int64_t>(dim.size, 1));
    if (b >= 140 && b < 180) step += width * (1 + b % 5);
  }
  return span;
}

inline int64_t span_of(const Write& write, int64_t Dim::* stride, int64_t width) {
  int64_t span = width;
  for (int i = 0; i < write.rank; ++i) {
    span += std::max<int64_t>(write.dims[i].size - 1, 0) * (write.dims[i].*stride);
  }
  return span;
}

// Types and loops of a write.
inline Write read_loops(Reader& in, const Limits& limits) {
  Write write{};
  const int64_t kind = in.byte();
  write.to = converted(in.byte());
  write.from = kind % 2 == 0 ? write.to : converted(in.byte());
  if (kind % 8 == 6) write.to = write.from = Type::Bytes16;
  write.nested = true;
  write.rank = static_cast<int>(in.byte() % (kMostLoops + 1));
  int64_t elements = 1;
  for (int i = 0; i < write.rank; ++i) {
    int64_t size = in.size();
    if (elements * size > limits.elements) size = 1;
    elements *= std::max<int64_t>(size, 1);
    write.dims[i].size = size;
  }
  read_strides(in, write, &Dim::dst, width_of(write.to), limits.bytes, false);
  read_strides(in, write, &Dim::src, width_of(write.from), limits.bytes, true);
  // Only now: the source may have made a loop shorter.
  write.dst_span = span_of(write, &Dim::dst, width_of(write.to));
  write.src_span = span_of(write, &Dim::src, width_of(write.from));
  return write;
}

inline void read_write(Reader& in, const Limits& limits, List& list) {
  // As the one before, a little beside it: columns of one matrix, or columns that overlap.
  const bool beside = in.byte() >= 200 && !list.writes.empty();
  Write write = beside ? list.writes.back() : read_loops(in, limits);
  // Behind what is there, at any byte, or anywhere within it: over other writes.
  const int64_t place = in.byte();
  if (beside) {
    write.dst += place % 40 * width_of(write.to);
  } else if (place < 170) {
    write.dst = list.dst_bytes - kGuard + place % 32;
  } else {
    write.dst = kGuard + in.two() % (list.dst_bytes - 2 * kGuard + 1);
  }
  list.dst_bytes = std::max(list.dst_bytes, write.dst + write.dst_span + kGuard);
  const int64_t from = in.byte();
  write.inside = from >= 190 && list.dst_bytes > write.src_span;
  if (write.inside) {
    write.src = in.two() % (list.dst_bytes - write.src_span + 1);
    // Within one write the two sides never meet: torch does those.
    write.inside = write.src + write.src_span <= write.dst || write.dst + write.dst_span <= write.src;
  }
  if (!write.inside) {
    write.src = from < 95 ? list.src_bytes + from % 32 : in.two() % (list.src_bytes + 1);
    list.src_bytes = std::max(list.src_bytes, write.src + write.src_span);
  }
  list.writes.push_back(write);
}

inline List read_list(const uint8_t* data, size_t size) {
  Reader in(data, size);
  List list;
  const int64_t count = 1 + in.byte() % 8;
  list.pieces = 1 + static_cast<int>(in.byte() % 7);
  const int64_t flags = in.byte();
  list.backwards = (flags & 1) != 0;
  list.streams = static_cast<int>(flags >> 1 & 7);
  list.phase = static_cast<int>(in.byte() % 64);
  list.seed = static_cast<uint32_t>(in.two());
  for (int64_t i = 0; i < count; ++i) read_write(in, flags >> 4 == 15 ? kLarge : kSmall, list);
  return list;
}

}  // namespace paramkit::fuzz
