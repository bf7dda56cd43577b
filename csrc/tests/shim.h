// What the CUDA kernels ask of a compiler, for the host: the threads of a block run one after the other, each
// on a stack of its own where they meet at __syncthreads.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))

namespace paramkit::shim {
void meet();  // the thread waits until all threads of the block are here
}

// Without barriers transposes must go wrong, or nothing here would notice one that is missing.
#if defined(PARAMKIT_SHIM_NO_BARRIER)
inline void __syncthreads() {}
#else
inline void __syncthreads() { paramkit::shim::meet(); }
#endif

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes of a, then b.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = a | uint64_t{b} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(both >> ((selector >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  }
  return result;
}

// The lower half of (high, low) shifted right by the lowest five bits of `shift`.
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((low | uint64_t{high} << 32) >> (shift & 31));
}
