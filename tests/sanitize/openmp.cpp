// What TSan has to be told of OpenMP. libgomp is not instrumented, so that TSan sees neither that a parallel region
// begins after what the caller did before, nor that the caller goes on after all of it, and reports every region.
//
// Linked into the build for TSan with --wrap=GOMP_parallel: fork and join are made known, nothing else. Two threads
// within one region remain unordered, so a race between them is reported (canary_parallel shows it).
#include <sanitizer/tsan_interface.h>

extern "C" {

void __real_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Region {
  void (*body)(void*);
  void* data;
  char fork, join;  // their addresses are what is released and acquired
};

__attribute__((no_sanitize("thread"))) static void in_region(void* opaque) {
  Region& region = *static_cast<Region*>(opaque);
  __tsan_acquire(&region.fork);
  region.body(region.data);
  __tsan_release(&region.join);
}

__attribute__((no_sanitize("thread"))) void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads,
                                                                 unsigned flags) {
  Region region{body, data, 0, 0};
  __tsan_release(&region.fork);
  __real_GOMP_parallel(in_region, &region, threads, flags);
  __tsan_acquire(&region.join);
}
}
