#include "cpu/kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/target.h"

PARAMKIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")

namespace paramkit::cpu {
namespace avx512 {

struct Vec {
  static constexpr int64_t kBytes = 64;
  static constexpr bool kStreams = true;
  using Reg = __m512i;
  static Reg load(const char* p) { return _mm512_loadu_si512(p); }
  static void store(char* p, Reg r) { _mm512_storeu_si512(p, r); }
  static void stream(char* p, Reg r) { _mm512_stream_si512(reinterpret_cast<Reg*>(p), r); }
  static void fence() { _mm_sfence(); }
};

#include "cpu/kernels.inc"

}  // namespace avx512

const Kernels kAvx512 = {"avx512", avx512::run_program};

}  // namespace paramkit::cpu

PARAMKIT_TARGET_END

#endif
