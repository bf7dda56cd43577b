#include "torch/staging.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "torch/devices.h"
#include "torch/transfer.h"

namespace paramkit {

namespace {

constexpr int64_t kDefault = int64_t{96} << 20;
constexpr int64_t kLeastSlot = 4096;

int64_t from_environment() {
  const char* text = std::getenv("PARAMKIT_STAGING_BYTES");
  return text != nullptr && *text != '\0' ? std::atoll(text) : kDefault;
}

std::atomic<int64_t>& wanted() {
  static std::atomic<int64_t> bytes{from_environment()};
  return bytes;
}

}  // namespace

int64_t staging_bytes() { return wanted(); }

// A power of two: torch's allocator of pinned memory rounds up to one.
int64_t slot_bytes_wanted() {
  int64_t bytes = kLeastSlot;
  while (bytes <= staging_bytes() / Ring::kSlots / 2) bytes *= 2;
  return bytes;
}

void set_staging_bytes(int64_t bytes) { wanted() = bytes < 0 ? from_environment() : bytes; }

void Mark::set(int where) {
  const at::Device device = devices::device_of(where);
  if (device.is_cpu()) return;
  event_.emplace(device.type());
  event_->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
}

void Mark::wait() {
  if (event_) event_->synchronize();
  event_.reset();
}

Ring& Ring::shared() {
  static auto* ring = new Ring;  // at exit the driver may be gone before it
  return *ring;
}

Ring::Hold::Hold(int64_t least, int64_t total) : total_(total), bytes_(std::max(slot_bytes_wanted(), least)) {
  if (total <= std::min(kSmall, bytes_)) {
    own_ = std::make_unique<Slot>();
    bytes_ = total;
    return;
  }
  Ring& ring = shared();
  lock_ = std::unique_lock<std::mutex>(ring.mutex_);
  if (bytes_ == ring.bytes_) return;
  for (Slot& slot : ring.slots_) {
    slot.last_use.wait();
    slot.memory.reset();
  }
  ring.bytes_ = bytes_;
}

Ring::Slot& Ring::Hold::slot(int index) const { return own_ ? *own_ : shared().slots_[static_cast<size_t>(index)]; }

at::Tensor& Ring::Hold::memory_of(int index) const {
  at::Tensor& memory = slot(index).memory;
  if (!memory.defined()) memory = devices::pinned_memory(bytes_);
  return memory;
}

void Ring::Hold::reserve() {
  if (own_) return;
  const auto wanted = std::min<int64_t>(kSlots, (total_ + bytes_ - 1) / bytes_);
  for (int i = 1; i <= wanted; ++i) (void)memory_of((current() + i) % kSlots);
}

int64_t Ring::Hold::slot_bytes() const { return bytes_; }

int Ring::Hold::current() const { return own_ ? 0 : shared().current_; }

char* Ring::Hold::next() {
  if (!own_) shared().current_ = (current() + 1) % kSlots;
  wait(current());
  return static_cast<char*>(memory_of(current()).mutable_data_ptr());
}

at::Tensor Ring::Hold::tensor(int64_t bytes) const { return memory_of(current()).narrow(0, 0, bytes); }

void Ring::Hold::used_by(int where) { slot(current()).last_use.set(where); }

void Ring::Hold::wait(int index) { slot(index).last_use.wait(); }

}  // namespace paramkit
