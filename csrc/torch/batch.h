// A list of writes on its way from torch tensors to the kernels: checked as it is recorded, written
// only when all of it has been.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <deque>
#include <functional>
#include <optional>
#include <vector>

#include "core/task.h"
#include "torch/tensors.h"

namespace paramkit {

// Writes on this thread by kernel family, and those that went to torch's own copy_ and fill_, for tests
// that assert the route.
struct Routes {
  int64_t families[kFamilies] = {};
  int64_t casts = 0;  // of those, how many converted
  int64_t native = 0;

  void add(const Program& program) {
    for (int f = 0; f < kFamilies; ++f) families[f] += program.families[f];
    casts += program.casts;
  }
};
Routes& routes();

class Batch {
 public:
  // Who looks after autograd: Follow it as torch's own operators do; Ignore it, as under no_grad with
  // detached sources; or the caller is a kernel Below it and has bumped the version counters.
  enum class Autograd : uint8_t { Follow, Ignore, Below };
  void set_autograd(Autograd mode) { autograd_ = mode; }

  // Where an error happened, in the caller's words: "foreach_copy_", entry 3 of dsts and srcs. An
  // index of -1 means that there is one tensor, not a list.
  struct Place {
    const char* op;
    int64_t index;
  };

  // A number to fill with. It remembers its last conversion: lists mostly fill one dtype.
  struct Number {
    c10::Scalar value;
    c10::ScalarType type{};
    int64_t few = 0;  // the number of elements that it was converted for, 2 for all above
    const char* bytes = nullptr;
  };

  // Record one write. They throw what torch throws for it, as far as that can be known beforehand.
  // The caller keeps the sources alive until run() is over; run() keeps the destinations.
  void copy(Place place, const at::Tensor& dst, const at::Tensor& src);
  void fill(Place place, const at::Tensor& dst, Number& value);
  void fill(Place place, const at::Tensor& dst, const at::Tensor& value);

  // Check what can be known of a write that torch's own copy_ or fill_ will do.
  void check_native(Place place, const at::Tensor& dst, const at::Tensor& src) const;
  void check_native(Place place, const at::Tensor& dst, const c10::Scalar& value) const;
  void check_native_fill(Place place, const at::Tensor& dst, const at::Tensor& value) const;

  // Record a write that only Python can do (a subclass with __torch_function__): calls `write` in its
  // turn.
  void defer(std::function<void(bool non_blocking)> write);

  // Whether other Python code may run during run(), because the GIL is given up or a write is Python's:
  // then the caller has to hold references of its own to the sources.
  bool runs_python() const;

  // Bumps every version counter, then writes, in the order recorded wherever memory is shared.
  void run(bool non_blocking);

  void clear();

 private:
  // A pair that torch's own copy_ or fill_ writes.
  struct Deferred {
    size_t before;  // the task that must wait for it
    at::Tensor dst, src;
    std::optional<c10::Scalar> value;  // fill_ with a number
    bool fill;
    bool raw;                        // below autograd, the version bumped by us
    std::function<void(bool)> call;  // instead of all that

    void write(bool non_blocking) const;
  };

  void check_version(Place place, Access how) const;
  bool records(const at::Tensor& dst, const at::TensorImpl* src) const;
  void copy_strided(Place place, const at::Tensor& dst, const at::Tensor& src);
  void defer_copy(const at::Tensor& dst, const at::Tensor& src);
  void defer_cast(const at::Tensor& dst, const at::Tensor& src);
  void defer_fill(const at::Tensor& dst, const c10::Scalar& value);
  const char* element(Number& number, c10::ScalarType type, int64_t numel);

  Autograd autograd_ = Autograd::Follow;
  Program program_;
  std::vector<at::TensorImpl*> bumps_;
  std::vector<Deferred> deferred_;
  std::deque<std::array<char, 16>> elements_;  // of fills; a deque keeps their addresses
};

// Runs the tasks [first, last) with torch's threads, the GIL released if it is held and the work is
// long. `disjoint`: the caller knows that no task writes what another reads or writes; otherwise it is
// looked at, and tasks that share memory run in order.
void run_tasks(const Program& program, size_t first, size_t last, bool disjoint);

}  // namespace paramkit
