// The C interface of the CUDA library. It sees no torch and is built by nvcc alone; the same functions are
// made a second time by csrc/tests/emulate.cpp, which runs the kernels on the host.
//
// All calls want the device of the stream to be the current one. Status 0 is success; others are CUDA's.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct paramkit_device {
  int32_t multiprocessors;
  int32_t capability;       // 90 for 9.0
  uint64_t argument_bytes;  // the largest packet that a launch takes by value
};

struct paramkit_launch {
  const void* packet;  // in host memory, taken by value; or, if resident, in device memory
  uint64_t bytes;
  uint64_t blocks;
  int32_t resident;
  void* stream;
};

// Number of this interface: a library that says another one is not used.
#if !defined(PARAMKIT_CUDA_INTERFACE)
#define PARAMKIT_CUDA_INTERFACE 1
#endif
// The functions by their names in the library: paramkit_interface, paramkit_describe, paramkit_launch_packet,
// paramkit_capturing, paramkit_keep, paramkit_error.
typedef int32_t paramkit_interface_fn();

typedef int32_t paramkit_describe_fn(int32_t device, paramkit_device* result);

typedef int32_t paramkit_launch_fn(const paramkit_launch* launch);

// Whether a graph is being captured from the stream.
typedef int32_t paramkit_capturing_fn(void* stream, int32_t* result);

// Calls release(object) once, when the graph that is being captured from the stream is gone, and with it
// everything instantiated from it, perhaps on a thread that may not call CUDA; or now, if that fails.
typedef int32_t paramkit_keep_fn(void* stream, void (*release)(void*), void* object);

typedef const char* paramkit_error_fn(int32_t status);

}  // extern "C"
