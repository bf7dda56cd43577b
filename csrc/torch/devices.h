// CUDA devices as far as the rest of this library sees them: whether the kernels reach a tensor, and running
// a program on its device in the order of the current stream. Memory, copies, streams and events are torch's
// own; nothing here needs CUDA to be compiled.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/task.h"
#include "torch/tensors.h"

namespace paramkit::devices {

// Opens the CUDA library. What is emulated: Kernels takes a library that runs the kernels on the host, and
// lets CPU tensors stand for tensors of a device; ToDevice and ToHost do that for destinations alone and for
// sources alone, so that all copies are transfers. For tests.
enum class Emulate : uint8_t { No, Kernels, ToDevice, ToHost };
void open(const std::string& path, Emulate emulate);
void close_emulated();

// Whether CUDA tensors may be the kernels' at all; the default.
void enable(bool wanted);

// Launches by this process so far, and the bytes of transfers that were staged.
struct Counts {
  int64_t launches = 0;
  int64_t uploads = 0;  // of them, whose packet went through device memory
  int64_t staged_bytes = 0;
};
Counts counts();
void count_staged(int64_t bytes);

// Where the kernels reach a tensor.
inline constexpr int kHost = -1, kNowhere = -2;  // else the index of a CUDA device
struct Home {
  int where;
  Access access;
};
extern bool any_emulated;
Home home(const at::TensorImpl& impl, bool written);

// Whether CPU tensors stand for a device's on both sides, and whether its kernels do these tasks.
bool kernels_emulated();
bool take_all(const Program& program, size_t first, size_t last);

// The access to a tensor by the kernels there.
inline Access access_at(const at::TensorImpl& impl, int where) {
  if (where == kHost || any_emulated) return access(impl);
  const Access found = cuda_access(impl);
  return found == Access::Native || impl.device().index() != where ? Access::Native : found;
}

// The device with that index, as torch names it.
at::Device device_of(int where);

// Makes it the current one.
c10::OptionalDeviceGuard guard(int where);

// Bytes on a device, which belong to the current stream, and pinned bytes on the host: from torch's allocators,
// for ordinary use whatever mode the caller is in.
at::Tensor device_memory(int64_t bytes, int where);
at::Tensor pinned_memory(int64_t bytes);

// Whether a graph is being captured from the current stream of a device.
bool capturing(int where);

// Launches the tasks [first, last) on the current stream of a device. `disjoint`: as for run_tasks().
void run(const Program& program, size_t first, size_t last, int where, bool disjoint);

// A program whose packets stay on the device: a run is one launch for each, and no upload. Its tasks write
// and read apart.
class Resident {
 public:
  Resident(const Program& program, int where);
  void run() const;

 private:
  struct Piece {
    at::Tensor memory;  // of the device
    uint64_t blocks;
  };
  int where_;
  int64_t stream_;  // on which it was made
  std::vector<Piece> pieces_;
};

}  // namespace paramkit::devices
