#include "cpu/kernels.h"

#if defined(__x86_64__)

// GCC 12 takes what its own header leaves undefined on purpose for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/classify.h"
#include "cpu/target.h"

#if defined(__clang__)  // which ignores all of it for the sake of a width
PARAMKIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")
#else
PARAMKIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")
#endif

namespace paramkit::cpu {
namespace avx512 {

#include "cpu/kernels/lane.inc"

struct Vec {
  static constexpr int64_t kBytes = 64;
  static constexpr int kLanes = 4;
  static constexpr bool kStreams = true;
  using Reg = __m512i;
  static Reg load(const char* p) { return _mm512_loadu_si512(p); }
  static void store(char* p, Reg r) { _mm512_storeu_si512(p, r); }
  static void stream(char* p, Reg r) {
    PARAMKIT_STREAMS ? _mm512_stream_si512(reinterpret_cast<Reg*>(p), r) : store(p, r);
  }
  static void fence() { _mm_sfence(); }
  static Reg gather(const char* p, int64_t step) {
    Reg r = _mm512_castsi128_si512(lane(p));
    r = _mm512_inserti32x4(r, lane(p + step), 1);
    r = _mm512_inserti32x4(r, lane(p + 2 * step), 2);
    return _mm512_inserti32x4(r, lane(p + 3 * step), 3);
  }
  template <int W>
  static Reg lo(Reg a, Reg b) {
    return W == 1   ? _mm512_unpacklo_epi8(a, b)
           : W == 2 ? _mm512_unpacklo_epi16(a, b)
           : W == 4 ? _mm512_unpacklo_epi32(a, b)
                    : _mm512_unpacklo_epi64(a, b);
  }
  template <int W>
  static Reg hi(Reg a, Reg b) {
    return W == 1   ? _mm512_unpackhi_epi8(a, b)
           : W == 2 ? _mm512_unpackhi_epi16(a, b)
           : W == 4 ? _mm512_unpackhi_epi32(a, b)
                    : _mm512_unpackhi_epi64(a, b);
  }
  static int64_t from_half(void* dst, const void* src, int64_t n) {
    for (int64_t i = 0; i < n / 16; ++i) {
      const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(src) + i);
      _mm512_storeu_ps(static_cast<float*>(dst) + 16 * i, _mm512_cvtph_ps(half));
    }
    return n & ~int64_t{15};
  }
  static constexpr bool kLooksUp = true;
  static constexpr bool kShifts16 = true;
  template <class F, int kBeyond>
  static int64_t from_brain(void* dst, const void* src, int64_t n) {
    const Reg least = all(F::kLeastNormal >> 23), drop = all(F::kDrop), one = all(1);
    for (int64_t i = 0; i < n / 32; ++i) {
      const Reg x = load(static_cast<const char*>(src) + 64 * i), magnitude = _mm512_and_si512(x, all(0x7fff));
      const Reg clamped = _mm512_min_epu16(magnitude, all(F::kTooLarge >> 16));
      const Reg exponent = _mm512_srli_epi16(clamped, 7), normal = _mm512_max_epu16(exponent, least);
      // Counts of 16 and more give zeros, which is right: nothing is left.
      const Reg shift = _mm512_add_epi16(drop, _mm512_sub_epi16(normal, exponent));
      const Reg significand = _mm512_or_si512(_mm512_and_si512(clamped, all(0x7f)), all(0x80));
      const Reg odd = _mm512_and_si512(_mm512_srlv_epi16(significand, shift), one);
      const Reg half = _mm512_srli_epi16(_mm512_sllv_epi16(one, shift), 1);
      const Reg sum = _mm512_add_epi16(_mm512_sub_epi16(_mm512_add_epi16(significand, half), one), odd);
      const Reg above = _mm512_slli_epi16(_mm512_sub_epi16(normal, least), 7 - F::kDrop);
      Reg code = _mm512_add_epi16(_mm512_srlv_epi16(sum, shift), above);
      code = _mm512_mask_mov_epi16(code, _mm512_cmpge_epu16_mask(code, all(F::kEnd)), all(kBeyond));
      const Reg sign = _mm512_and_si512(_mm512_srli_epi16(x, 8), all(0x80));
      if constexpr (F::kSigned) {
        code = _mm512_mask_mov_epi16(code, _mm512_cmpgt_epu16_mask(magnitude, all(0x7f80)), all(F::kNan));
        code = _mm512_or_si512(code, sign);
      } else {
        // Zero and NaN have no sign.
        const __mmask32 signless = _mm512_cmpeq_epi16_mask(_mm512_and_si512(code, all(0x7f)), _mm512_setzero_si512());
        code = _mm512_mask_mov_epi16(_mm512_or_si512(code, sign), signless, code);
      }
      _mm256_storeu_si256(static_cast<__m256i*>(dst) + i, _mm512_cvtepi16_epi8(code));
    }
    return n & ~int64_t{31};
  }
  static int64_t look_up(void* dst, const void* src, int64_t n, const uint16_t* table) {
    Reg part[8];
    for (int i = 0; i < 8; ++i) part[i] = _mm512_load_si512(table + 32 * i);
    const Reg bit6 = _mm512_set1_epi16(0x40), bit7 = _mm512_set1_epi16(0x80);
    for (int64_t i = 0; i < n / 32; ++i) {
      const Reg x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(src) + i));
      const __mmask32 second = _mm512_test_epi16_mask(x, bit6), upper = _mm512_test_epi16_mask(x, bit7);
      const Reg low = _mm512_mask_blend_epi16(second, _mm512_permutex2var_epi16(part[0], x, part[1]),
                                              _mm512_permutex2var_epi16(part[2], x, part[3]));
      const Reg high = _mm512_mask_blend_epi16(second, _mm512_permutex2var_epi16(part[4], x, part[5]),
                                               _mm512_permutex2var_epi16(part[6], x, part[7]));
      _mm512_storeu_si512(static_cast<char*>(dst) + 64 * i, _mm512_mask_blend_epi16(upper, low, high));
    }
    return n & ~int64_t{31};
  }
  static int64_t to_half(void* dst, const void* src, int64_t n) {
    for (int64_t i = 0; i < n / 16; ++i) {
      const __m512 wide = _mm512_loadu_ps(static_cast<const float*>(src) + 16 * i);
      _mm256_storeu_si256(static_cast<__m256i*>(dst) + i, _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    }
    return n & ~int64_t{15};
  }

 private:
  static Reg all(uint32_t value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }
  static __m128i lane(const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
};

#include "cpu/kernels.inc"

}  // namespace avx512

const Kernels kAvx512 = {"avx512", avx512::run_program, avx512::cast_elements};

}  // namespace paramkit::cpu

PARAMKIT_TARGET_END

#endif
