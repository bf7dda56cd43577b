// The CUDA library, opened: the functions of cuda/library.h behind errors that say what failed.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/library.h"
#include "cuda/pack.h"

namespace paramkit::cuda {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Library {
 public:
  // Throws Error with the reason: no such file, a function missing, another interface.
  explicit Library(const std::string& path);

  // What is known of a device; it must be the current one.
  paramkit_device describe(int device) const;

  // Launches one packet, by value, or from device memory.
  void launch(const Packet& packet, void* stream) const;
  void launch_resident(const void* packet, uint64_t blocks, void* stream) const;

  bool capturing(void* stream) const;

  // See paramkit_keep_fn.
  void keep(void* stream, void (*release)(void*), void* object) const;

 private:
  void check(int32_t status, const char* what) const;

  paramkit_describe_fn* describe_;
  paramkit_launch_fn* launch_;
  paramkit_capturing_fn* capturing_;
  paramkit_keep_fn* keep_;
  paramkit_error_fn* error_;
};

}  // namespace paramkit::cuda
