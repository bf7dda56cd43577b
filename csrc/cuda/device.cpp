#include "cuda/device.h"

#include <dlfcn.h>

namespace paramkit::cuda {

namespace {

template <class Function>
Function* find(void* handle, const std::string& path, const char* name) {
  void* symbol = dlsym(handle, name);
  if (symbol == nullptr) throw Error(path + " has no function " + name);
  return reinterpret_cast<Function*>(symbol);
}

}  // namespace

Library::Library(const std::string& path) {
  // Never closed: kernels of it may be in captured graphs.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw Error(dlerror());
  const int32_t interface = find<paramkit_interface_fn>(handle, path, "paramkit_interface")();
  if (interface != PARAMKIT_CUDA_INTERFACE) {
    throw Error(path + " has interface " + std::to_string(interface) + ", expected " +
                std::to_string(PARAMKIT_CUDA_INTERFACE) + ": build it again");
  }
  describe_ = find<paramkit_describe_fn>(handle, path, "paramkit_describe");
  launch_ = find<paramkit_launch_fn>(handle, path, "paramkit_launch_packet");
  capturing_ = find<paramkit_capturing_fn>(handle, path, "paramkit_capturing");
  keep_ = find<paramkit_keep_fn>(handle, path, "paramkit_keep");
  error_ = find<paramkit_error_fn>(handle, path, "paramkit_error");
}

void Library::check(int32_t status, const char* what) const {
  if (status != 0) throw Error(std::string(what) + ": " + error_(status));
}

paramkit_device Library::describe(int device) const {
  paramkit_device result{};
  check(describe_(device, &result), "describing the device");
  return result;
}

void Library::launch(const Packet& packet, void* stream) const {
  const paramkit_launch launch{packet.data(), packet.size(), packet.blocks, 0, stream};
  check(launch_(&launch), "launching the kernel");
}

void Library::launch_resident(const void* packet, uint64_t blocks, void* stream) const {
  const paramkit_launch launch{packet, 0, blocks, 1, stream};
  check(launch_(&launch), "launching the kernel");
}

bool Library::capturing(void* stream) const {
  int32_t result = 0;
  check(capturing_(stream, &result), "asking whether a graph is being captured");
  return result != 0;
}

void Library::keep(void* stream, void (*release)(void*), void* object) const {
  check(keep_(stream, release, object), "keeping descriptors alive with the graph");
}

}  // namespace paramkit::cuda
