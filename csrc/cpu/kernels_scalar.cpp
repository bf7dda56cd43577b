// For any machine: what the compiler makes of the generic source for the base instruction set.
#include "cpu/kernels.h"

#include <algorithm>
#include <cstring>

namespace paramkit::cpu {
namespace scalar {

struct Vec {
  static constexpr int64_t kBytes = 16;
  static constexpr bool kStreams = false;
  struct Reg {
    char b[16];
  };
  static Reg load(const char* p) {
    Reg r;
    std::memcpy(&r, p, 16);
    return r;
  }
  static void store(char* p, Reg r) { std::memcpy(p, &r, 16); }
  static void stream(char* p, Reg r) { store(p, r); }
  static void fence() {}
};

#include "cpu/kernels.inc"

}  // namespace scalar

const Kernels kScalar = {"scalar", scalar::run_program};

}  // namespace paramkit::cpu
