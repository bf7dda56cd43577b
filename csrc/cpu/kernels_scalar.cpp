// For any machine: what the compiler makes of the generic source for the base instruction set.
#include "cpu/kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/classify.h"

namespace paramkit::cpu {
namespace scalar {

#include "cpu/kernels/lane.inc"

struct Vec : Lane {
  static constexpr int64_t kBytes = 16;
  static constexpr int kLanes = 1;
  static constexpr bool kStreams = false;
  static void stream(char* p, Reg r) { store(p, r); }
  static void fence() {}
  static Reg gather(const char* p, int64_t) { return load(p); }
  static int64_t from_half(void*, const void*, int64_t) { return 0; }
  static constexpr bool kLooksUp = false;
  static constexpr bool kShifts16 = false;
  template <class, int>
  static int64_t from_brain(void*, const void*, int64_t) {
    return 0;
  }
  static int64_t look_up(void*, const void*, int64_t, const uint16_t*) { return 0; }
  static int64_t to_half(void*, const void*, int64_t) { return 0; }
};

#include "cpu/kernels.inc"

}  // namespace scalar

const Kernels kScalar = {"scalar", scalar::run_program, scalar::cast_elements};

}  // namespace paramkit::cpu
