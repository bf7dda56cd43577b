#include "torch/devices.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>

#include "core/overlap.h"
#include "cpu/kernels.h"
#include "cuda/device.h"
#include "torch/threads.h"

namespace paramkit::devices {

namespace py = pybind11;

bool any_emulated = false;

namespace {

enum class State : uint8_t { Untried, Open, Failed };

std::atomic<State> state{State::Untried};
std::atomic<bool> enabled{true};
Emulate emulate = Emulate::No;
std::unique_ptr<cuda::Library> library;  // replaced only by tests
std::unique_ptr<cuda::Library> real_library;
std::atomic<int64_t> launches{0}, uploads{0}, staged{0};

// What is known of each device, asked once.
struct Known {
  cuda::Machine machine;
  size_t by_value;
};

Known ask(int where) {
  const paramkit_device device = library->describe(where);
  return {{device.multiprocessors, cpu::e4m3fn_saturates}, static_cast<size_t>(device.argument_bytes)};
}

Known known(int where) {
  if (any_emulated) return ask(0);
  static std::mutex mutex;
  static std::map<int, Known> all;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = all.find(where);
  return found != all.end() ? found->second : all.emplace(where, ask(where)).first->second;
}

// Looks for the library once, at the first CUDA tensor. Python knows where it is, and warns if it is not.
bool find_library() {
  const py::gil_scoped_acquire gil;
  if (state == State::Untried) {
    const bool found = py::module_::import("paramkit.backend.cuda").attr("open_library")().cast<bool>();
    if (!found) state = State::Failed;
  }
  return state == State::Open;
}

bool ready() {
  if (!enabled.load(std::memory_order_relaxed)) return false;
  const State now = state.load(std::memory_order_acquire);
  return now == State::Untried ? find_library() : now == State::Open;
}

// The current stream of a device, as CUDA knows it. By way of Python, since torch before 2.11 has no other
// that needs no CUDA headers.
void* current_stream(int where) {
  if (any_emulated) return nullptr;
  const py::gil_scoped_acquire gil;
  // No guard of a static variable, for which a thread that has the GIL could wait: the import may give it up.
  static std::atomic<PyObject*> function{nullptr};
  if (function == nullptr) {
    py::object found = py::module_::import("torch._C").attr("_cuda_getCurrentRawStream");
    function = found.release().ptr();
  }
  return reinterpret_cast<void*>(py::handle(function)(where).cast<uintptr_t>());
}

c10::Stream torch_stream(int where) {
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(device_of(where));
}

int64_t stream_id(int where) { return any_emulated ? 0 : torch_stream(where).id(); }

// What graphs that are gone kept alive. The call that tells us may not free device memory itself.
std::mutex& graveyard_mutex() {
  static std::mutex mutex;
  return mutex;
}
std::vector<at::Tensor>& graveyard() {
  static auto* tensors = new std::vector<at::Tensor>;
  return *tensors;
}
void bury(void* object) {
  auto* tensor = static_cast<at::Tensor*>(object);
  const std::lock_guard<std::mutex> lock(graveyard_mutex());
  graveyard().push_back(std::move(*tensor));
  delete tensor;
}
void clear_graveyard() {
  std::vector<at::Tensor> dead;
  const std::lock_guard<std::mutex> lock(graveyard_mutex());
  dead.swap(graveyard());
}

// A packet in device memory, which belongs to the current stream.
at::Tensor upload(const cuda::Packet& packet, int where, bool blocking) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto bytes = static_cast<int64_t>(packet.size());
  const at::Tensor on_device = device_memory(bytes, where);
  if (blocking) {
    const c10::InferenceMode not_inference(false);
    on_device.copy_(at::from_blob(const_cast<char*>(packet.data()), {bytes}, at::TensorOptions().dtype(at::kByte)));
    return on_device;
  }
  // torch's allocator of pinned memory keeps the block until the stream has read it.
  const at::Tensor pinned = pinned_memory(bytes);
  std::memcpy(pinned.mutable_data_ptr(), packet.data(), packet.size());
  on_device.copy_(pinned, /*non_blocking=*/true);
  return on_device;
}

void launch_packets(const Program& program, size_t first, size_t last, int where) {
  const Known device = known(where);
  void* stream = current_stream(where);
  // A graph would read an uploaded packet anew at every replay: there all packets go by value.
  const bool captured = !any_emulated && library->capturing(stream);
  const auto packets = cuda::pack(program, first, last, device.machine, captured ? device.by_value : SIZE_MAX);
  for (const cuda::Packet& packet : packets) {
    ++launches;
    if (packet.size() <= device.by_value) {
      library->launch(packet, stream);
      continue;
    }
    ++uploads;
    const at::Tensor memory = upload(packet, where, false);
    library->launch_resident(memory.const_data_ptr(), packet.blocks, stream);
  }
}

// Tasks that share memory run in their order, in as few launches as halving finds.
void launch_in_order(const Program& program, size_t first, size_t last, int where) {
  if (last - first <= 1 || !share_memory(program, first, last)) return launch_packets(program, first, last, where);
  const size_t middle = first + (last - first) / 2;
  launch_in_order(program, first, middle, where);
  launch_in_order(program, middle, last, where);
}

}  // namespace

void open(const std::string& path, Emulate how) {
  auto opened = std::make_unique<cuda::Library>(path);
  if (how == Emulate::No) {
    // A driver that is too old says so now, not at the first write.
    if (c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA)) {
      opened->describe(c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getDevice().index());
    }
    real_library = std::move(opened);
    if (!any_emulated) library = std::move(real_library);
    state = State::Open;
    return;
  }
  if (!any_emulated) real_library = std::move(library);
  library = std::move(opened);
  emulate = how;
  any_emulated = true;
}

void close_emulated() {
  library = std::move(real_library);
  any_emulated = false;
  emulate = Emulate::No;
}

bool kernels_emulated() { return any_emulated && emulate == Emulate::Kernels; }

bool take_all(const Program& program, size_t first, size_t last) {
  return std::all_of(program.tasks.begin() + static_cast<ptrdiff_t>(first),
                     program.tasks.begin() + static_cast<ptrdiff_t>(last), [](const Task& task) {
                       const bool fills = task.family == Family::Fill || task.number;
                       return cuda::takes(task.dst, task.number ? nullptr : task.src, task.to, task.from, fills) &&
                              !(task.number && task.casts());
                     });
}

void enable(bool wanted) { enabled = wanted; }

Counts counts() { return {launches, uploads, staged}; }

void count_staged(int64_t bytes) { staged += bytes; }

Home home(const at::TensorImpl& impl, bool written) {
  const Access on_cpu = access(impl);
  if (on_cpu != Access::Native) {
    const bool stands_for_device =
        any_emulated && (emulate == Emulate::Kernels || (emulate == Emulate::ToDevice) == written);
    return {stands_for_device ? 0 : kHost, on_cpu};
  }
  const Access on_cuda = cuda_access(impl);
  if (on_cuda == Access::Native || !ready()) return {kNowhere, Access::Native};
  return {static_cast<int>(impl.device().index()), on_cuda};
}

at::Device device_of(int where) {
  return any_emulated || where < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(where));
}

c10::OptionalDeviceGuard guard(int where) {
  return any_emulated ? c10::OptionalDeviceGuard() : c10::OptionalDeviceGuard(device_of(where));
}

at::Tensor device_memory(int64_t bytes, int where) {
  const c10::InferenceMode not_inference(false);
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_of(where)));
}

at::Tensor pinned_memory(int64_t bytes) {
  const c10::InferenceMode not_inference(false);
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(!any_emulated));
}

bool capturing(int where) {
  if (any_emulated) return false;
  const auto on_device = guard(where);
  return library->capturing(current_stream(where));
}

void run(const Program& program, size_t first, size_t last, int where, bool disjoint) {
  if (first == last) return;
  const ReleaseGil released(!any_emulated);  // a launch may have to wait for the device
  const auto on_device = guard(where);
  clear_graveyard();
  disjoint ? launch_packets(program, first, last, where) : launch_in_order(program, first, last, where);
}

Resident::Resident(const Program& program, int where) : where_(where), stream_(stream_id(where)) {
  const ReleaseGil released(!any_emulated);
  const auto on_device = guard(where);
  TORCH_CHECK(!capturing(where),
              "a plan that writes on a CUDA device keeps its descriptors there, which cannot be "
              "done while a graph is captured: make the plan before the capture");
  for (const cuda::Packet& packet : cuda::pack(program, 0, program.tasks.size(), known(where).machine)) {
    pieces_.push_back({upload(packet, where, true), packet.blocks});
  }
}

void Resident::run() const {
  const ReleaseGil released(!any_emulated);
  const auto on_device = guard(where_);
  clear_graveyard();
  void* stream = current_stream(where_);
  const bool captured = !any_emulated && library->capturing(stream);
  for (const Piece& piece : pieces_) {
    if (captured) {
      library->keep(stream, bury, new at::Tensor(piece.memory));  // the graph's now
    } else if (stream_id(where_) != stream_) {
      piece.memory.record_stream(torch_stream(where_));
    }
    ++launches;
    library->launch_resident(piece.memory.const_data_ptr(), piece.blocks, stream);
  }
}

}  // namespace paramkit::devices
