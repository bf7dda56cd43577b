// Mistakes made on purpose. Each sanitizer has to catch its own before its run over the suite counts for anything.
//
// Compiled with a sanitizer's flags into the extension of its build (tree.py), and by itself for
// tests/test_sanitizers.py. Called by ctypes (canary.py), so the module needs to know nothing of it.
#include <omp.h>

#include <cstdint>
#include <cstdlib>

#define CANARY extern "C" __attribute__((visibility("default"), noinline))

// Writes one byte more than it is asked for.
CANARY void canary_overrun(char* bytes, int64_t n) {
  for (int64_t i = 0; i <= n; ++i) static_cast<volatile char*>(bytes)[i] = 1;
}

CANARY int32_t canary_overflow(int32_t n) { return n + 1; }

// Counts in memory that the other caller counts in, too.
CANARY void canary_race(volatile int64_t* count, int64_t times) {
  for (int64_t i = 0; i < times; ++i) *count = *count + 1;
}

// The same, once both callers are here: nothing that they do later orders them, whichever runs first. The counter itself
// orders nothing, as it is relaxed.
CANARY void canary_race_of_two(volatile int64_t* count, int64_t times, int32_t* arrived) {
  __atomic_fetch_add(arrived, 1, __ATOMIC_RELAXED);
  while (__atomic_load_n(arrived, __ATOMIC_RELAXED) < 2) {
  }
  canary_race(count, times);
}

// A parallel region as torch's at::parallel_for has it. Each thread counts in a place of its own, or, `racy`,
// all of them in the first one.
CANARY void canary_parallel(volatile int64_t* counts, int64_t times, int32_t racy) {
#pragma omp parallel num_threads(2)
  canary_race(counts + (racy != 0 ? 0 : omp_get_thread_num()), times);
}

CANARY void canary_leak(int64_t size) {
  // More than one: the last address may linger in a register or on the stack.
  for (int i = 0; i < 100; ++i) static_cast<volatile char*>(std::malloc(static_cast<size_t>(size)))[0] = 1;
}
