#include "cpu/kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/classify.h"
#include "cpu/target.h"

PARAMKIT_TARGET_BEGIN("avx2,f16c")

namespace paramkit::cpu {
namespace avx2 {

#include "cpu/kernels/lane.inc"

struct Vec {
  static constexpr int64_t kBytes = 32;
  static constexpr int kLanes = 2;
  static constexpr bool kStreams = true;
  using Reg = __m256i;
  static Reg load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const Reg*>(p)); }
  static void store(char* p, Reg r) { _mm256_storeu_si256(reinterpret_cast<Reg*>(p), r); }
  static void stream(char* p, Reg r) {
    PARAMKIT_STREAMS ? _mm256_stream_si256(reinterpret_cast<Reg*>(p), r) : store(p, r);
  }
  static void fence() { _mm_sfence(); }
  static Reg gather(const char* p, int64_t step) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(lane(p)), lane(p + step), 1);
  }
  template <int W>
  static Reg lo(Reg a, Reg b) {
    return W == 1   ? _mm256_unpacklo_epi8(a, b)
           : W == 2 ? _mm256_unpacklo_epi16(a, b)
           : W == 4 ? _mm256_unpacklo_epi32(a, b)
                    : _mm256_unpacklo_epi64(a, b);
  }
  template <int W>
  static Reg hi(Reg a, Reg b) {
    return W == 1   ? _mm256_unpackhi_epi8(a, b)
           : W == 2 ? _mm256_unpackhi_epi16(a, b)
           : W == 4 ? _mm256_unpackhi_epi32(a, b)
                    : _mm256_unpackhi_epi64(a, b);
  }
  static int64_t from_half(void* dst, const void* src, int64_t n) {
    for (int64_t i = 0; i < n / 8; ++i) {
      const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(src) + i);
      _mm256_storeu_ps(static_cast<float*>(dst) + 8 * i, _mm256_cvtph_ps(half));
    }
    return n & ~int64_t{7};
  }
  static constexpr bool kLooksUp = false;
  static constexpr bool kShifts16 = false;
  template <class, int>
  static int64_t from_brain(void*, const void*, int64_t) {
    return 0;
  }
  static int64_t look_up(void*, const void*, int64_t, const uint16_t*) { return 0; }
  static int64_t to_half(void* dst, const void* src, int64_t n) {
    for (int64_t i = 0; i < n / 8; ++i) {
      const __m256 wide = _mm256_loadu_ps(static_cast<const float*>(src) + 8 * i);
      _mm_storeu_si128(static_cast<__m128i*>(dst) + i, _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    }
    return n & ~int64_t{7};
  }

 private:
  static __m128i lane(const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
};

#include "cpu/kernels.inc"

}  // namespace avx2

const Kernels kAvx2 = {"avx2", avx2::run_program, avx2::cast_elements};

}  // namespace paramkit::cpu

PARAMKIT_TARGET_END

#endif
