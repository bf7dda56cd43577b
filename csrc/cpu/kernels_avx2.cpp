#include "cpu/kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/target.h"

PARAMKIT_TARGET_BEGIN("avx2")

namespace paramkit::cpu {
namespace avx2 {

struct Vec {
  static constexpr int64_t kBytes = 32;
  static constexpr bool kStreams = true;
  using Reg = __m256i;
  static Reg load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const Reg*>(p)); }
  static void store(char* p, Reg r) { _mm256_storeu_si256(reinterpret_cast<Reg*>(p), r); }
  static void stream(char* p, Reg r) { _mm256_stream_si256(reinterpret_cast<Reg*>(p), r); }
  static void fence() { _mm_sfence(); }
};

#include "cpu/kernels.inc"

}  // namespace avx2

const Kernels kAvx2 = {"avx2", avx2::run_program};

}  // namespace paramkit::cpu

PARAMKIT_TARGET_END

#endif
