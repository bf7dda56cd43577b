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
