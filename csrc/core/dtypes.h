// The element types that the kernels know. A write between equal types moves bytes and needs only
// their width; a write between different ones is a cast.
#pragma once

#include <cstdint>

namespace paramkit {

enum class Type : uint8_t {
  Bytes1,  // any type that is only moved, by its width
  Bytes2,
  Bytes4,
  Bytes8,
  Bytes16,
  Float64,
  Float32,
  Float16,
  BFloat16,
  Float8E4M3FN,
  Float8E4M3FNUZ,
  Float8E5M2,
  Float8E5M2FNUZ,
  Float8E8M0FNU,
  Int8,
  Int16,
  Int32,
  Int64,
  UInt8,
  UInt16,
  UInt32,
  UInt64,
  Bool,
};
inline constexpr int kTypes = 23;
inline constexpr uint8_t kWidths[kTypes] = {1, 2, 4, 8, 16, 8, 4, 2, 2, 1, 1, 1, 1, 1, 1, 2, 4, 8, 1, 2, 4, 8, 1};

// Bytes of one element.
inline constexpr int64_t width_of(Type type) { return kWidths[static_cast<int>(type)]; }

inline constexpr Type bytes_of_width(int64_t width) {
  return width == 1   ? Type::Bytes1
         : width == 2 ? Type::Bytes2
         : width == 4 ? Type::Bytes4
         : width == 8 ? Type::Bytes8
                      : Type::Bytes16;
}

}  // namespace paramkit
