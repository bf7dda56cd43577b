// Opens and closes a region compiled for one instruction set, after all includes, so that no function
// of another header is compiled for it. setuptools gives every file the same flags, and a program
// built with -march would not start on an older machine.
#pragma once

#define PARAMKIT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PARAMKIT_TARGET_BEGIN(isa) \
  PARAMKIT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PARAMKIT_TARGET_END _Pragma("clang attribute pop")
#else
#define PARAMKIT_TARGET_BEGIN(isa) _Pragma("GCC push_options") PARAMKIT_PRAGMA(GCC target(isa))
#define PARAMKIT_TARGET_END _Pragma("GCC pop_options")
#endif

// Sanitizers do not see stores past the cache, which are no ordinary ones to the compiler: their builds have none.
#define PARAMKIT_STREAMS 1
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#undef PARAMKIT_STREAMS
#define PARAMKIT_STREAMS 0
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#undef PARAMKIT_STREAMS
#define PARAMKIT_STREAMS 0
#endif
