#include "torch/claims.h"

#include <pthread.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>

#include "torch/threads.h"

namespace paramkit {

namespace py = pybind11;

namespace {

// All claims, in the order in which they came. Never destroyed: threads may outlive the main one.
struct Registry {
  std::mutex mutex;  // held for moments, and never while the GIL is waited for
  std::condition_variable changed;
  std::vector<Claim*> claims;
  std::atomic<size_t> count{0};
  std::atomic<bool> wanted{true};
};

Registry& registry() {
  static auto* const all = new Registry;
  return *all;
}

// How often a thread that waits looks whether it was interrupted.
constexpr auto kLook = std::chrono::milliseconds(50);

bool meet(const std::vector<Range>& a, const std::vector<Range>& b) {
  const auto behind = [](auto from, auto end, const char* begin) {
    return std::partition_point(from, end, [begin](const Range& r) { return r.end <= begin; });
  };
  for (auto i = a.begin(), j = b.begin(); i != a.end() && j != b.end();) {
    if (i->meets(*j)) return true;
    if (i->end <= j->begin) {
      i = behind(i, a.end(), j->begin);
    } else {
      j = behind(j, b.end(), i->begin);
    }
  }
  return false;
}

bool finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

}  // namespace

std::vector<Range> merged(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  size_t kept = 0;
  for (const Range& next : ranges) {
    if (kept > 0 && next.begin <= ranges[kept - 1].end) {
      ranges[kept - 1].end = std::max(ranges[kept - 1].end, next.end);
    } else {
      ranges[kept++] = next;
    }
  }
  ranges.resize(kept);
  return ranges;
}

std::vector<Range> ranges_of(const std::vector<at::Tensor>& tensors) {
  std::vector<Range> ranges;
  ranges.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    const at::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    if (impl.layout() == c10::kStrided && impl.has_storage() && has_shape(tensor) && impl.numel() > 0 &&
        has_memory(impl)) {
      ranges.push_back(range(impl));
    }
  }
  return merged(std::move(ranges));
}

void raise_plan_error(const char* text) {
  const py::object type = py::module_::import("paramkit.errors").attr("PlanError");
  PyErr_SetString(type.ptr(), text);
  throw py::error_already_set();
}

bool Claim::others() { return registry().count.load(std::memory_order_relaxed) != 0; }

// Whether a claim of another thread is at the same memory, and one of the two writes it: one that came before, or that
// is at work. A thread that holds a claim looks at those at work alone: what waits may wait for it. So it may pass by
// what waits, which has to see it there, behind itself.
bool Claim::blocked(bool holding) const {
  const bool writes_dsts = doing_ != Doing::Compare, writes_srcs = doing_ == Doing::Exchange;
  bool before = !holding;
  for (const Claim* other : registry().claims) {
    if (other == this) before = false;
    if (other->thread_ == thread_ || !(before || other->active_)) continue;
    const Extent &own = claimant_.extent(), &theirs = other->claimant_.extent();
    const bool they_write_dsts = other->doing_ != Doing::Compare, they_write_srcs = other->doing_ == Doing::Exchange;
    if (((writes_dsts || they_write_dsts) && meet(own.dsts, theirs.dsts)) ||
        ((writes_dsts || they_write_srcs) && meet(own.dsts, theirs.srcs)) ||
        ((writes_srcs || they_write_dsts) && meet(own.srcs, theirs.dsts)) ||
        ((writes_srcs || they_write_srcs) && meet(own.srcs, theirs.srcs))) {
      return true;
    }
  }
  return false;
}

void Claim::take() {
  Registry& all = registry();
  if (!all.wanted.load(std::memory_order_relaxed)) return;
  thread_ = static_cast<uintptr_t>(pthread_self());
  bool holding = false;
  try {
    {
      const std::lock_guard<std::mutex> lock(all.mutex);
      holding = std::any_of(all.claims.begin(), all.claims.end(),
                            [this](const Claim* other) { return other->thread_ == thread_; });
      all.claims.push_back(this);
      all.count = all.claims.size();
      active_ = taken_ = !blocked(holding);
      waited_ = !taken_;
    }
    if (taken_) return;
    if (holding) {
      raise_plan_error(
          "another thread is at the same tensors, and cannot be waited for inside a write of this thread; nothing was "
          "written.");
    }
    wait();
  } catch (...) {
    release();
    throw;
  }
  taken_ = true;
}

void Claim::wait() {
  Registry& all = registry();
  while (true) {
    {
      const ReleaseGil released(true);
      std::unique_lock<std::mutex> lock(all.mutex);
      active_ = all.changed.wait_for(lock, kLook, [this] { return !blocked(false); });
      // The lock is given back before the GIL is waited for.
    }
    if (active_) return;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    // The other thread may have been stopped for good.
    if (finalizing()) raise_plan_error("the interpreter is on its way out; nothing was written.");
  }
}

void Claim::release() {
  Registry& all = registry();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto own = std::find(all.claims.begin(), all.claims.end(), this);
    if (own != all.claims.end()) all.claims.erase(own);
    all.count = all.claims.size();
  }
  all.changed.notify_all();
}

void prepare_claims() {
  // A child has the forking thread alone; the claims of the others are nobody's there, and what the condition
  // variable knows of waiting threads is wrong.
  pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                 [] {
                   Registry& all = registry();
                   new (&all.changed) std::condition_variable;
                   const auto self = static_cast<uintptr_t>(pthread_self());
                   all.claims.erase(std::remove_if(all.claims.begin(), all.claims.end(),
                                                   [self](const Claim* claim) { return !claim->of(self); }),
                                    all.claims.end());
                   all.count = all.claims.size();
                   all.mutex.unlock();
                 });
}

bool set_claims(bool wanted) { return registry().wanted.exchange(wanted); }

}  // namespace paramkit
