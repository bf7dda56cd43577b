// A list of writes on its way from torch tensors to the kernels: checked as it is recorded, written
// only when all of it has been.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <optional>
#include <vector>

#include "core/task.h"
#include "torch/devices.h"
#include "torch/elsewhere.h"
#include "torch/tensors.h"
#include "torch/threads.h"

namespace paramkit {

// Writes on this thread by kernel family, and those that went to torch's own copy_ and fill_, for tests
// that assert the route.
struct Routes {
  int64_t families[kFamilies] = {};
  int64_t casts = 0;  // of those, how many converted
  int64_t native = 0;
  int64_t staged = 0;  // copies between host and device, through pinned memory

  void add(const Program& program) {
    for (int f = 0; f < kFamilies; ++f) families[f] += program.families[f];
    casts += program.casts;
  }
  void add(const Elsewhere& writes);
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
  // The caller keeps all tensors alive until run() is over.
  void copy(Place place, const at::Tensor& dst, const at::Tensor& src);

  // Records the first of `n` copies, in `pieces` pieces at once, as long as the kernels can do them and
  // nobody else has a say. Returns how many. dst(i) and src(i) give the tensors, or null for one that is not
  // plain; they are called by several threads.
  template <class Dst, class Src>
  size_t copy_plain(size_t n, size_t pieces, Dst dst, Src src);
  void fill(Place place, const at::Tensor& dst, Number& value);
  void fill(Place place, const at::Tensor& dst, const at::Tensor& value);

  // Records a fill if the kernels can do it and nobody else has a say.
  bool fill_plain(const at::Tensor& dst, const c10::Scalar& value);

  // Check what can be known of a write that torch's own copy_ or fill_ will do.
  void check_native(Place place, const at::Tensor& dst, const at::Tensor& src) const;
  void check_native(Place place, const at::Tensor& dst, const c10::Scalar& value) const;
  void check_native_fill(Place place, const at::Tensor& dst, const at::Tensor& value) const;

  // Record a write that only Python can do (a subclass with __torch_function__): calls `write` in its
  // turn.
  void defer(std::function<void(bool non_blocking)> write);

  // Whether other Python code may run during run(), because the GIL is given up or a write is Python's:
  // then the caller has to hold references of its own to the tensors.
  bool runs_python() const;

  // Bumps every version counter, then writes, in the order recorded wherever memory is shared.
  void run(bool non_blocking);

  void clear();

 private:
  // A pair that torch's own copy_ or fill_ writes.
  struct Deferred {
    at::Tensor dst, src;
    std::optional<c10::Scalar> value;  // fill_ with a number
    bool fill;
    bool raw;                        // below autograd, the version bumped by us
    std::function<void(bool)> call;  // instead of all that

    void write(bool non_blocking) const;
  };

  // Where writes are recorded, each list in order: tasks for the CPU, pairs for torch, then others_.
  enum : uint32_t { kCpu, kNative, kOthers };
  // The order of all of them: `count` of one list, then of another.
  struct Step {
    uint32_t list;
    size_t count;
  };
  void step(uint32_t list, size_t count = 1) {
    if (!steps_.empty() && steps_.back().list == list) {
      steps_.back().count += count;
    } else {
      steps_.push_back({list, count});
    }
  }
  uint32_t list_of(int dst_home, int src_home);
  Elsewhere& other(uint32_t list) { return others_[list - kOthers]; }
  bool apart(size_t first, size_t last, std::vector<size_t> done) const;
  void run_list(uint32_t list, size_t count, std::vector<size_t>& done, bool non_blocking);
  bool add_write(int dst_home, int src_home, char* dst, const char* src, Type to, Type from, const Dim* dims, int rank,
                 bool number);

  // Adds a copy of equal dtypes and shapes, dense on both sides. False, and nothing added, if it is none or
  // not plain().
  bool add_dense(const at::TensorImpl& dst, const at::TensorImpl& src, int where, bool grad_mode,
                 Program& program) const;
  // The same for any shapes and strides.
  bool add_strided(const at::TensorImpl& dst, const at::TensorImpl& src, int where, bool grad_mode,
                   Program& program) const;
  bool add_fill(const at::TensorImpl& dst, int where, const char* element);
  // Whether a tensor may be written without a version counter's being raised, or has one.
  bool writable(Access how) const {
    return how == Access::Plain || (how == Access::Inference && autograd_ == Autograd::Below);
  }
  // Whether a copy is the kernels' alone, both sides there, as far as can be told without the shapes.
  bool plain(const at::TensorImpl& dst, const at::TensorImpl& src, int where, bool grad_mode) const;
  void check_version(Place place, Access how) const;
  bool records(const at::Tensor& dst, const at::TensorImpl* src) const;
  void copy_strided(Place place, const at::Tensor& dst, devices::Home to_home, const at::Tensor& src,
                    devices::Home from_home);
  void defer(Deferred deferred);
  void defer_copy(const at::Tensor& dst, const at::Tensor& src);
  void defer_cast(const at::Tensor& dst, const at::Tensor& src);
  void defer_fill(const at::Tensor& dst, const c10::Scalar& value);
  const char* element(Number& number, c10::ScalarType type, int64_t numel);

  Autograd autograd_ = Autograd::Follow;
  Program program_;
  std::vector<Program> parts_;  // of copy_plain, empty between calls
  std::vector<at::TensorImpl*> bumps_;
  std::vector<Deferred> deferred_;
  std::vector<Elsewhere> others_;
  std::vector<Step> steps_;
  std::deque<std::array<char, 16>> elements_;  // of fills; a deque keeps their addresses
};

inline bool Batch::plain(const at::TensorImpl& to, const at::TensorImpl& from, int where, bool grad_mode) const {
  return writable(devices::access_at(to, where)) && devices::access_at(from, where) != Access::Native &&
         has_memory(to) && has_memory(from) &&
         (autograd_ != Autograd::Follow || !(on_autograd(to, grad_mode) || on_autograd(from, grad_mode)));
}

inline bool Batch::add_dense(const at::TensorImpl& to, const at::TensorImpl& from, int where, bool grad_mode,
                             Program& program) const {
  if (!plain(to, from, where, grad_mode) || to.dtype() != from.dtype() || !to.is_contiguous() ||
      !from.is_contiguous() || to.sizes() != from.sizes()) {
    return false;
  }
  const auto type = c10::typeMetaToScalarType(to.dtype());
  const auto width = static_cast<int64_t>(to.itemsize());
  const int64_t bytes = to.numel() * width;
  char* d = data(to);
  const char* s = data(from);
  if (bytes == 0 || (d < s + bytes && s < d + bytes) || !conversion_known(type, type)) return false;
  program.add_contiguous(d, s, bytes, width);
  return true;
}

template <class Dst, class Src>
size_t Batch::copy_plain(size_t n, size_t pieces, Dst dst, Src src) {
  // Where the first pair is; what is elsewhere is not plain here.
  const at::TensorImpl* first_dst = dst(0);
  const at::TensorImpl* first_src = src(0);
  if (first_dst == nullptr || first_src == nullptr) return 0;
  const int where = devices::home(*first_dst, true).where;
  if (where == devices::kNowhere || where != devices::home(*first_src, false).where) return 0;
  const uint32_t list = list_of(where, where);
  Program& all = list == kCpu ? program_ : other(list).tasks();
  const size_t bumps = bumps_.size();
  bumps_.resize(bumps + n);
  if (parts_.size() < pieces) parts_.resize(pieces);
  const bool grad_mode = at::GradMode::is_enabled();
  std::atomic<size_t> plain_ones{n};  // as far as is known
  in_pieces(n, pieces, [&](size_t piece, size_t first, size_t last) {
    Program& program = pieces == 1 ? all : parts_[piece];
    for (size_t i = first; i < last; ++i) {
      size_t known = plain_ones.load(std::memory_order_relaxed);
      if (known < i) return;
      at::TensorImpl* to = dst(i);
      const at::TensorImpl* from = src(i);
      if (to == nullptr || from == nullptr ||
          !(add_dense(*to, *from, where, grad_mode, program) || add_strided(*to, *from, where, grad_mode, program))) {
        while (i < known && !plain_ones.compare_exchange_weak(known, i)) {
        }
        return;
      }
      bumps_[bumps + i] = to;
    }
  });
  bumps_.resize(bumps + plain_ones);
  if (plain_ones > 0) step(list, plain_ones);
  for (size_t piece = 0; pieces > 1 && piece < pieces; ++piece) {
    // Behind the first that is not plain nothing counts.
    if (n * piece / pieces < plain_ones) all.append(parts_[piece]);
    parts_[piece].clear();
  }
  return plain_ones;
}

}  // namespace paramkit
