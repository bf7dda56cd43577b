#include "cpu/capability.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstring>

namespace paramkit::cpu {

namespace {

#if defined(__x86_64__)
// Older clangs' builtin does not know the name.
bool converts_half() {
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found = {&kScalar};
#if defined(__x86_64__)
  // The builtin asks cpuid, and xgetbv for what the operating system saves.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && converts_half();
  if (avx2) found.push_back(&kAvx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back(&kAvx512);
  }
#endif
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> kernels = detect();
  return kernels;
}

const Kernels& active() {
  const Kernels* kernels = chosen.load(std::memory_order_relaxed);
  return kernels != nullptr ? *kernels : *available().back();
}

bool choose(const char* name) {
  for (const Kernels* kernels : available()) {
    if (std::strcmp(kernels->name, name) != 0) continue;
    chosen.store(kernels, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace paramkit::cpu
