// What a list of writes does, element by element in plain loops: what the core and the kernels are held to.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "fuzz_input.h"

namespace paramkit::fuzz {

// Calls body(destination, source), the offsets of each element from where the sides begin.
template <class Body>
void each_element(const Write& write, Body body) {
  int64_t index[kMostLoops] = {};
  for (int i = 0; i < write.rank; ++i) {
    if (write.dims[i].size == 0) return;
  }
  while (true) {
    int64_t dst = 0, src = 0;
    for (int i = 0; i < write.rank; ++i) {
      dst += index[i] * write.dims[i].dst;
      src += index[i] * write.dims[i].src;
    }
    body(dst, src);
    int i = write.rank - 1;
    for (; i >= 0; --i) {
      if (++index[i] < write.dims[i].size) break;
      index[i] = 0;
    }
    if (i < 0) return;
  }
}

inline bool is_nan(Type type, const char* element) {
  if (type < Type::Float64 || type > Type::Float8E8M0FNU) return false;
  double value;
  cpu::kScalar.cast(Type::Float64, type, reinterpret_cast<char*>(&value), element, 1);
  return std::isnan(value);
}

// Bytes, and which of them may be anything: those that a NaN became, whose bits are nobody's promise.
struct Memory {
  std::vector<char> bytes, loose;
};

inline void write_naively(const Write& write, Memory& dst, const std::vector<char>& outside) {
  const auto width = static_cast<size_t>(width_of(write.to)), src_width = static_cast<size_t>(width_of(write.from));
  each_element(write, [&](int64_t to, int64_t from) {
    const auto d = static_cast<size_t>(write.dst + to), s = static_cast<size_t>(write.src + from);
    const char* source = write.inside ? dst.bytes.data() + s : outside.data() + s;
    bool loose = false;
    for (size_t b = 0; write.inside && b < src_width; ++b) loose |= dst.loose[s + b] != 0;
    char element[16], made[16];
    std::memcpy(element, source, src_width);
    if (write.to == write.from) {
      for (size_t b = 0; b < width; ++b) dst.loose[d + b] = write.inside ? dst.loose[s + b] : 0;
      std::memcpy(dst.bytes.data() + d, element, width);
      return;
    }
    cpu::kScalar.cast(write.to, write.from, made, element, 1);
    std::memcpy(dst.bytes.data() + d, made, width);
    std::memset(dst.loose.data() + d, loose || is_nan(write.from, element), width);
  });
}

// Whether one element of the destination comes twice.
inline bool repeats(const Write& write) {
  std::vector<char> seen(static_cast<size_t>(write.dst_span));
  bool twice = false;
  each_element(write, [&](int64_t to, int64_t) {
    for (int64_t b = 0; b < width_of(write.to); ++b) {
      twice |= seen[static_cast<size_t>(to + b)] != 0;
      seen[static_cast<size_t>(to + b)] = 1;
    }
  });
  return twice;
}

// Whether one of the writes writes a byte that another one writes or reads.
inline bool share_bytes(const List& list) {
  std::vector<size_t> writer(static_cast<size_t>(list.dst_bytes));
  bool shared = false;
  for (size_t w = 0; w < list.writes.size(); ++w) {
    const Write& write = list.writes[w];
    each_element(write, [&](int64_t to, int64_t) {
      for (int64_t b = 0; b < width_of(write.to); ++b) {
        size_t& owner = writer[static_cast<size_t>(write.dst + to + b)];
        shared |= owner != 0 && owner != w + 1;
        owner = w + 1;
      }
    });
  }
  for (size_t w = 0; w < list.writes.size(); ++w) {
    const Write& write = list.writes[w];
    if (!write.inside) continue;
    each_element(write, [&](int64_t, int64_t from) {
      for (int64_t b = 0; b < width_of(write.from); ++b) {
        const size_t owner = writer[static_cast<size_t>(write.src + from + b)];
        shared |= owner != 0 && owner != w + 1;
      }
    });
  }
  return shared;
}

// Whether the stretches from the first to the last byte of any two writes are apart, and those read from them.
inline bool stretches_apart(const List& list) {
  const auto meet = [](int64_t a, int64_t a_span, int64_t b, int64_t b_span) {
    return a < b + b_span && b < a + a_span;
  };
  for (const Write& write : list.writes) {
    for (const Write& other : list.writes) {
      if (&write != &other && meet(write.dst, write.dst_span, other.dst, other.dst_span)) return false;
      if (other.inside && meet(write.dst, write.dst_span, other.src, other.src_span)) return false;
    }
  }
  return true;
}

}  // namespace paramkit::fuzz
