// The pinned slots that transfers go through, one ring for the process.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>

namespace paramkit {

// Something that was put into a device's current stream, to be waited for.
class Mark {
 public:
  // Marks what is in the stream of `where` now.
  void set(int where);
  // Waits until all of it has been done; returns at once if nothing was marked.
  void wait();

 private:
  std::optional<c10::Event> event_;
};

class Ring {
  struct Slot {
    at::Tensor memory;
    Mark last_use;
  };

 public:
  static constexpr int kSlots = 3;
  static constexpr int64_t kSmall = 1 << 20;

  // The ring, held until this object is gone: one call at a time fills slots. The caller has given up the GIL,
  // which the one that holds the ring may need.
  class Hold {
   public:
    // For `total` bytes: slots are as large as staging_bytes() makes them, but hold at least `least` bytes. Up to
    // kSmall there is one slot, from torch's own cache of pinned memory, and the ring is left alone: a few biases
    // need not pin tens of MiB, nor wait for anybody.
    Hold(int64_t least, int64_t total);
    // Pins as many slots as the bytes need, unless they are: it may fail, and nothing has been written yet.
    void reserve();
    // The next slot, once nothing uses it any more: `slot_bytes()` of pinned memory.
    char* next();
    int64_t slot_bytes() const;
    // The first `bytes` of the slot that next() gave, as a tensor.
    at::Tensor tensor(int64_t bytes) const;
    // What is in the stream of `where` now uses the slot that next() gave.
    void used_by(int where);
    int current() const;
    void wait(int slot);

   private:
    Slot& slot(int index) const;
    at::Tensor& memory_of(int index) const;

    int64_t total_, bytes_;      // in all, and of a slot
    std::unique_ptr<Slot> own_;  // the only one, of a small transfer
    std::unique_lock<std::mutex> lock_;
  };

 private:
  friend class Hold;
  static Ring& shared();

  std::mutex mutex_;
  std::array<Slot, kSlots> slots_;
  int64_t bytes_ = 0;  // of a slot
  int current_ = kSlots - 1;
};

// The bytes of all slots together: PARAMKIT_STAGING_BYTES, or set_staging_bytes() (negative: as at first), or
// 96 MiB.
int64_t staging_bytes();
void set_staging_bytes(int64_t bytes);
// Of each.
int64_t slot_bytes_wanted();

}  // namespace paramkit
