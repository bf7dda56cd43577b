#include "torch/plan.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <map>

#include "cpu/run.h"
#include "torch/batch.h"
#include "torch/claims.h"
#include "torch/scratch.h"
#include "torch/threads.h"

namespace paramkit {

namespace py = pybind11;

namespace {

// A tensor's Python object, borrowed: it lives as long as the tensor.
PyObject* python_object(const at::TensorBase& tensor) {
  PyObject* object = THPVariable_Wrap(tensor);
  Py_DECREF(object);
  return object;
}

// What reference counts look like when only a C++ object, this plan, holds a tensor, or holds a view
// and through it the base: measured, once, since versions of torch differ in which side owns which.
Plan::Counts measure_orphan(bool view) {
  at::Tensor tensor = at::empty({2});
  PyObject* object = python_object(tensor);
  at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const at::Tensor only = view ? tensor.narrow(0, 0, 1) : tensor;
  tensor.reset();
  return {c10::raw::intrusive_ptr::use_count(impl), Py_REFCNT(object)};
}

const Plan::Counts& orphan_counts(bool view) {
  static const Plan::Counts of_tensor = measure_orphan(false), of_base = measure_orphan(true);
  return view ? of_base : of_tensor;
}

bool meets(const std::vector<Range>& ranges, const at::TensorImpl& impl) {
  if (!impl.has_storage() || impl.numel() == 0) return false;
  const Range own = range(impl);
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), own.begin,
                                      [](const char* begin, const Range& r) { return begin < r.end; });
  return after != ranges.end() && after->meets(own);
}

// A progress call about this often.
constexpr int64_t kProgressBytes = 32 << 20;

}  // namespace

void Plan::prepare() { orphan_counts(false); }

// Finds the kind of a tensor, or adds it.
class Plan::Kinds {
 public:
  explicit Kinds(Plan& plan) : plan_(plan) {}

  Snapshot snapshot(const at::Tensor& tensor) {
    const at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    const bool strided = impl->layout() == c10::kStrided && impl->has_storage();
    std::vector<int64_t> layout;
    if (strided) {
      layout.insert(layout.end(), impl->sizes().begin(), impl->sizes().end());
      layout.insert(layout.end(), impl->strides().begin(), impl->strides().end());
    }
    std::vector<uint64_t> key{impl->key_set().raw_repr(),
                              static_cast<uint64_t>(c10::typeMetaToScalarType(impl->dtype()))};
    key.insert(key.end(), layout.begin(), layout.end());
    const auto [found, added] = known_.try_emplace(std::move(key), static_cast<uint32_t>(plan_.kinds_.size()));
    if (added) {
      const auto rank = static_cast<uint32_t>(layout.size() / 2);
      plan_.kinds_.push_back({impl->key_set(), impl->dtype(), rank, plan_.layouts_.size()});
      plan_.layouts_.insert(plan_.layouts_.end(), layout.begin(), layout.end());
    }
    Snapshot result{};
    result.kind = found->second;
    if (strided) result.storage = impl->unsafe_storage().unsafeGetStorageImpl();
    plan_.set_memory(result, tensor);
    return result;
  }

 private:
  Plan& plan_;
  std::map<std::vector<uint64_t>, uint32_t> known_;
};

Plan::Plan(std::vector<at::Tensor> dsts, std::vector<at::Tensor> srcs, std::vector<Write> writes,
           std::vector<Slot> slots, bool follow_autograd, bool ordered)
    : dsts_(std::move(dsts)),
      srcs_(std::move(srcs)),
      writes_(std::move(writes)),
      slots_(std::move(slots)),
      follow_autograd_(follow_autograd),
      ordered_(ordered),
      orphan_counts_{orphan_counts(false), orphan_counts(true)} {
  Kinds kinds(*this);
  for (const at::Tensor& tensor : dsts_) {
    dst_snapshots_.push_back(kinds.snapshot(tensor));
    if (follow_autograd_) {
      Owner owner{python_object(tensor), nullptr, nullptr};
      if (tensor.is_view()) {
        owner.base = tensor._base().unsafeGetTensorImpl();
        owner.base_object = python_object(tensor._base());
      }
      owners_.push_back(owner);
    }
  }
  for (const at::Tensor& tensor : srcs_) src_snapshots_.push_back(kinds.snapshot(tensor));
  compile();
}

// Leaves what was compiled before as it was if it throws: a device may have no memory for it.
void Plan::compile() {
  Program program;
  std::vector<uint32_t> task_write, native;
  std::vector<Other> others;
  const auto exchange = [&] {
    std::swap(program_, program);
    std::swap(task_write_, task_write);
    std::swap(native_, native);
    std::swap(others_, others);
  };
  exchange();
  try {
    program_.tasks.reserve(writes_.size());
    for (size_t w = 0; w < writes_.size(); ++w) compile(w);
    for (Other& other : others_) other.make_resident();
  } catch (...) {
    exchange();
    throw;
  }
}

void Plan::compile(size_t w) {
  const Write& write = writes_[w];
  const at::TensorImpl& dst = *dsts_.at(static_cast<size_t>(write.dst)).unsafeGetTensorImpl();
  const at::TensorImpl& src = *srcs_.at(static_cast<size_t>(write.src)).unsafeGetTensorImpl();
  const size_t rank = write.sizes.size();
  Type to{}, from{};
  const int to_home = devices::home(dst, true).where, from_home = devices::home(src, false).where;
  const bool on_host = to_home == devices::kHost && from_home == devices::kHost;
  // Between two devices torch's own copy_ knows the way. Writes that have an order keep it here or by torch.
  const bool reachable = to_home == from_home || to_home == devices::kHost || from_home == devices::kHost;
  if (to_home == devices::kNowhere || from_home == devices::kNowhere || !reachable || (ordered_ && !on_host) ||
      rank > kMaxRank ||
      !kernel_types(c10::typeMetaToScalarType(dst.dtype()), c10::typeMetaToScalarType(src.dtype()), to, from)) {
    native_.push_back(static_cast<uint32_t>(w));
    return;
  }
  const int64_t width = width_of(to), src_width = width_of(from);
  Dim dims[kMaxRank];
  for (size_t i = 0; i < rank; ++i)
    dims[i] = {write.sizes[i], write.dst_strides[i] * width, write.src_strides[i] * src_width};
  char* const d = data(dst) + write.dst_offset * width;
  const char* const s = data(src) + write.src_offset * src_width;
  Other* const other = on_host ? nullptr : &others_[index_of(others_, to_home, from_home)];
  const auto tasks = [&] { return on_host ? program_.tasks.size() : other->size(); };
  const size_t before = tasks();
  const bool added = on_host ? program_.add(d, s, to, from, dims, static_cast<int>(rank))
                             : other->add(d, s, to, from, dims, static_cast<int>(rank), false);
  if (!added) native_.push_back(static_cast<uint32_t>(w));
  if (tasks() > before) (on_host ? task_write_ : other->write_of).push_back(static_cast<uint32_t>(w));
}

std::vector<std::string> Plan::families() const {
  std::vector<std::string> names(writes_.size(), "empty");
  for (size_t t = 0; t < program_.tasks.size(); ++t) {
    names[task_write_[t]] = kFamilyNames[static_cast<int>(program_.tasks[t].family)];
  }
  for (const Other& other : others_) {
    for (size_t t = 0; t < other.size(); ++t) {
      const auto family = static_cast<int>(other.writes().tasks[t].family);
      names[other.write_of[t]] = other.transfers() ? "staged" : kFamilyNames[family];
    }
  }
  for (uint32_t w : native_) names[w] = "native";
  return names;
}

// --- is everything still as planned? -----------------------------------------------------------

// Takes the tensor of a snapshot, and where its memory is.
void Plan::set_memory(Snapshot& snapshot, const at::Tensor& tensor) const {
  snapshot.impl = tensor.unsafeGetTensorImpl();
  if (snapshot.storage == nullptr) return;
  snapshot.storage = snapshot.impl->unsafe_storage().unsafeGetStorageImpl();
  snapshot.data = data(*snapshot.impl);
  snapshot.bytes = snapshot.storage->nbytes();
  snapshot.copy_on_write = copy_on_write(*snapshot.impl);
}

// Whether a tensor has the dtype, keys, shape and strides of a snapshot, wherever its memory is. Of one
// that is not strided torch's own copy_ judges the shape.
C10_ALWAYS_INLINE bool Plan::same_layout(const Snapshot& was, const at::TensorImpl& impl) const {
  const Kind& kind = kinds_[was.kind];
  if (impl.key_set() != kind.keys || impl.dtype() != kind.dtype) return false;
  if (was.storage == nullptr) return true;
  const auto sizes = impl.sizes(), strides = impl.strides();
  const int64_t* layout = layouts_.data() + kind.layout;
  if (sizes.size() != kind.rank) return false;
  for (uint32_t i = 0; i < kind.rank; ++i) {
    if (sizes[i] != layout[i] || strides[i] != layout[kind.rank + i]) return false;
  }
  return true;
}

// A storage that was shrunk may lie where it lay before; one that became copy-on-write still does.
C10_ALWAYS_INLINE bool Plan::intact(const Snapshot& was) const {
  const at::TensorImpl& impl = *was.impl;
  if (was.storage == nullptr) return same_layout(was, impl);
  return impl.unsafe_storage().unsafeGetStorageImpl() == was.storage && same_layout(was, impl) &&
         data(impl) == was.data && was.storage->nbytes() == was.bytes && copy_on_write(impl) == was.copy_on_write;
}

// Whether only this plan keeps a tensor alive: whoever it was planned for has another one now. Only a
// plan of lists can hold such a tensor without a slot noticing. Memory that more tensors share than
// this one (and its base) is not judged: it belongs to somebody else.
inline bool Plan::orphan(size_t dst) const {
  const auto held_here = [](at::TensorImpl* impl, PyObject* object, const Counts& counts) {
    return Py_REFCNT(object) <= counts.object && c10::raw::intrusive_ptr::use_count(impl) <= counts.tensor;
  };
  if (owners_.empty()) return false;
  const Owner& owner = owners_[dst];
  at::TensorImpl* impl = dst_snapshots_[dst].impl;
  if (!held_here(impl, owner.object, orphan_counts_[0]) || !impl->has_storage()) return false;
  if (impl->unsafe_storage().use_count() != (owner.base == nullptr ? 1U : 2U)) return false;
  return owner.base == nullptr || held_here(owner.base, owner.base_object, orphan_counts_[1]);
}

inline bool Plan::slot_holds(const Slot& slot) const {
  return PyDict_GetItemWithError(slot.table.ptr(), slot.key.ptr()) == slot.value.ptr();
}

// `recorded`: set if native autograd would look at a write to or from one of them.
//
// Of the 25 ns that a replay takes for a pair of 64 floats, this takes about 13 (two tensors), the
// version counter 5 (one locked increment) and the copy 6. Most of it is the cache lines of the tensors
// themselves: leaving out the sizes and strides saves 4 ns, all else together 3. Tried without gain in short lists:
// fetching the objects ahead, comparing them with images of their bytes a vector at a time, and keeping
// the sizes of vectors beside the rest.
template <class Also>
bool Plan::intact(const std::vector<Snapshot>& all, bool& recorded, Also also) const {
  const bool grad_mode = at::GradMode::is_enabled();
  std::atomic<bool> whole{true}, any{false};
  in_pieces(all.size(), pieces_of(all.size()), [&](size_t, size_t first, size_t last) {
    constexpr size_t kAhead = 12;
    const size_t fetched = all.size() > kLongList ? last - std::min(last - first, kAhead) : 0;
    bool own = false;
    for (size_t i = first; i < last; ++i) {
      const Snapshot& was = all[i];
      if (i > first && was.impl == all[i - 1].impl) continue;  // one number for a thousand slices
      if (i < fetched) {
        prefetch(all[i + kAhead].impl);
        prefetch(all[i + kAhead].storage);
      }
      if (!intact(was) || !also(i)) return whole.store(false);
      if (follow_autograd_) own |= on_autograd(*was.impl, grad_mode);
    }
    if (own) any = true;
  });
  recorded |= any;
  return whole;
}

bool Plan::intact(bool& recorded) const {
  return std::all_of(slots_.begin(), slots_.end(), [this](const Slot& slot) { return slot_holds(slot); }) &&
         intact(dst_snapshots_, recorded, [this](size_t i) { return !orphan(i); }) &&
         intact(src_snapshots_, recorded, [](size_t) { return true; });
}

std::vector<int64_t> Plan::replaced() const {
  std::vector<int64_t> found;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!slot_holds(slots_[i])) found.push_back(static_cast<int64_t>(i));
  }
  return found;
}

std::pair<std::vector<int64_t>, std::vector<int64_t>> Plan::moved() const {
  std::pair<std::vector<int64_t>, std::vector<int64_t>> found;
  for (size_t i = 0; i < dsts_.size(); ++i) {
    if (!intact(dst_snapshots_[i]) || orphan(i)) found.first.push_back(static_cast<int64_t>(i));
  }
  for (size_t i = 0; i < srcs_.size(); ++i) {
    if (!intact(src_snapshots_[i])) found.second.push_back(static_cast<int64_t>(i));
  }
  return found;
}

// Where the tensors were when they were planned for: other threads ask, and may not look at tensors.
std::vector<Range> Plan::planned(const std::vector<Snapshot>& all) const {
  std::vector<Range> ranges;
  ranges.reserve(all.size());
  for (const Snapshot& was : all) {
    if (was.storage == nullptr) continue;
    const Kind& kind = kinds_[was.kind];
    const auto width = static_cast<int64_t>(kind.dtype.itemsize());
    const int64_t* sizes = layouts_.data() + kind.layout;
    int64_t reach = width;
    bool empty = false;
    for (uint32_t i = 0; i < kind.rank; ++i) {
      empty |= sizes[i] == 0;
      reach += (sizes[i] - 1) * sizes[kind.rank + i] * width;
    }
    if (!empty) ranges.push_back({was.data, was.data + reach});
  }
  return merged(std::move(ranges));
}

const std::vector<Range>& Plan::extent_dsts() const {
  if (!dsts_known_) extent_.dsts = planned(dst_snapshots_);
  dsts_known_ = true;
  return extent_.dsts;
}

const Extent& Plan::extent() const {
  extent_dsts();
  if (!srcs_known_) extent_.srcs = planned(src_snapshots_);
  srcs_known_ = true;
  return extent_;
}

// --- writing -----------------------------------------------------------------------------------

bool Plan::rebind(const py::dict& tensors, const py::list& names) {
  TORCH_CHECK(names.size() == srcs_.size(), "rebind: expected ", srcs_.size(), " names, got ", names.size());
  const std::vector<Range>& written = extent_dsts();
  std::vector<at::Tensor> srcs;
  srcs.reserve(srcs_.size());
  for (size_t i = 0; i < srcs_.size(); ++i) {
    PyObject* value = PyDict_GetItemWithError(tensors.ptr(), PyList_GET_ITEM(names.ptr(), static_cast<Py_ssize_t>(i)));
    if (value == nullptr || !THPVariable_CheckExact(value)) return true;
    const at::Tensor& tensor = THPVariable_Unpack(value);
    const at::TensorImpl& now = *tensor.unsafeGetTensorImpl();
    // Compared with what was planned for, not with the old source: that may have been resized since.
    if (!same_layout(src_snapshots_[i], now) || now.device() != srcs_[i].device()) return true;
    if (now.layout() == c10::kStrided && (!has_memory(now) || meets(written, now))) return true;
    srcs.push_back(tensor);
  }
  std::vector<Snapshot> snapshots = src_snapshots_;
  srcs_known_ = false;
  srcs_.swap(srcs);
  for (size_t i = 0; i < srcs_.size(); ++i) set_memory(src_snapshots_[i], srcs_[i]);
  if (!others_.empty()) {
    try {
      compile();
    } catch (...) {
      srcs_.swap(srcs);
      srcs_known_ = false;
      src_snapshots_.swap(snapshots);
      throw;
    }
    return false;
  }
  for (size_t t = 0; t < program_.tasks.size(); ++t) {
    const Write& write = writes_[task_write_[t]];
    const at::TensorImpl& src = *srcs_[static_cast<size_t>(write.src)].unsafeGetTensorImpl();
    program_.tasks[t].src = data(src) + write.src_offset * static_cast<int64_t>(src.itemsize());
  }
  return false;
}

at::Tensor Plan::view(const at::Tensor& tensor, const Write& write, bool dst) const {
  const auto& strides = dst ? write.dst_strides : write.src_strides;
  if (tensor.layout() != c10::kStrided ||
      (tensor.sizes() == at::IntArrayRef(write.sizes) && tensor.strides() == at::IntArrayRef(strides))) {
    return tensor.detach();
  }
  return tensor.detach().as_strided(write.sizes, strides,
                                    tensor.storage_offset() + (dst ? write.dst_offset : write.src_offset));
}

void Plan::copy_native(size_t w) const {
  const at::NoGradGuard no_grad;
  const Write& write = writes_[w];
  view(dsts_[static_cast<size_t>(write.dst)], write, true)
      .copy_(view(srcs_[static_cast<size_t>(write.src)], write, false));
}

bool Plan::run(const py::object& progress) {
  const bool plain = plain_context();
  const Claim claim(
      program_.bytes >= kReleaseGil || !progress.is_none() || !others_.empty() || !native_.empty() || !plain, *this);
  bool recorded = false;
  if (!intact(recorded)) return false;
  const auto tell_all = [&] {
    if (progress.is_none()) return;
    int64_t bytes = 0;
    for (size_t w = 0; w < writes_.size(); ++w) bytes += bytes_of(w);
    progress(bytes, bytes);
  };
  if (recorded) {
    const Scratch batch;
    for (const Write& write : writes_) {
      batch->copy({"apply", write.dst}, dsts_[static_cast<size_t>(write.dst)], srcs_[static_cast<size_t>(write.src)]);
    }
    ++runs_;
    batch->run(false);
    tell_all();
    return true;
  }
  if (!plain) {  // a mode or a tracer: it has to see every write
    ++runs_;
    for (size_t w = 0; w < writes_.size(); ++w) copy_native(w);
    routes().native += static_cast<int64_t>(writes_.size());
    tell_all();
    return true;
  }
  for (const Other& other : others_) other.check();
  ++runs_;
  bump_versions(dst_snapshots_.size(), [this](size_t i) { return dst_snapshots_[i].impl; });
  routes().add(program_);
  for (const Other& other : others_) routes().add(other);
  routes().native += static_cast<int64_t>(native_.size());
  if (ordered_ || !progress.is_none()) {
    run_in_pieces(progress);
    return true;
  }
  // All lists in any order: what is written here is read nowhere in this plan.
  for (const Other& other : others_) other.transfers() ? other.run(0, other.size(), false) : other.run_resident();
  run_tasks(program_, 0, program_.tasks.size(), true);
  for (uint32_t w : native_) copy_native(w);
  return true;
}

int64_t Plan::bytes_of(size_t w) const {
  int64_t bytes = static_cast<int64_t>(dsts_[static_cast<size_t>(writes_[w].dst)].element_size());
  for (int64_t n : writes_[w].sizes) bytes *= n;
  return bytes;
}

// Where something happens between the writes: an order to keep, or a progress to tell.
void Plan::run_in_pieces(const py::object& progress) {
  int64_t total = program_.bytes, done = 0, told = 0;
  for (uint32_t w : native_) total += bytes_of(w);
  for (const Other& other : others_) total += other.writes().bytes;
  const auto advance = [&](int64_t bytes) {
    done += bytes;
    if (progress.is_none() || (done - told < kProgressBytes && done != total)) return;
    told = done;
    progress(done, total);
    bool recorded = false;
    if (done != total && !intact(recorded)) {
      raise_plan_error("a tensor was replaced, moved or resized by the progress callback of the plan that writes it.");
    }
  };
  for (const Other& other : others_) {
    if (!other.transfers()) {  // one launch
      other.run_resident();
      advance(other.writes().bytes);
      continue;
    }
    for (size_t first = 0, last = 0; first < other.size(); first = last) {
      int64_t bytes = 0;
      for (last = first; last < other.size() && bytes < kProgressBytes; ++last) bytes += bytes_of(other.write_of[last]);
      other.run(first, last, last < other.size());
      advance(bytes);
    }
  }
  size_t native = 0;
  const auto run_native = [&] {
    copy_native(native_[native]);
    advance(bytes_of(native_[native++]));
  };
  for (size_t first = 0, last = 0; first < program_.tasks.size(); first = last) {
    // Among ordered writes, torch's own copies keep their place too.
    while (ordered_ && native < native_.size() && native_[native] < task_write_[first]) run_native();
    int64_t bytes = 0;
    for (last = first; last < program_.tasks.size() && (last == first || (!ordered_ && bytes < kProgressBytes));
         ++last) {
      bytes += bytes_of(task_write_[last]);
    }
    run_tasks(program_, first, last, true);
    advance(bytes);
  }
  while (native < native_.size()) run_native();
}

bool Plan::exchange() {
  for (const Write& write : writes_) {
    const at::Tensor& dst = dsts_[static_cast<size_t>(write.dst)];
    const at::Tensor& src = srcs_[static_cast<size_t>(write.src)];
    if (dst.dtype() != src.dtype()) throw py::value_error("exchange: a write converts, and cannot be turned round");
    for (size_t i = 0; i < write.sizes.size(); ++i) {
      if (write.sizes[i] > 1 && write.src_strides[i] == 0) {
        throw py::value_error("exchange: a write repeats its source, and cannot be turned round");
      }
    }
  }
  bool recorded = false;
  if (!intact(recorded)) return false;
  swap(std::vector<char>(writes_.size(), 1));
  return true;
}

std::vector<int64_t> Plan::exchange_back() {
  std::vector<char> chosen(writes_.size(), 1);
  std::vector<int64_t> left;
  for (size_t w = 0; w < writes_.size(); ++w) {
    const Write& write = writes_[w];
    if (intact(dst_snapshots_[static_cast<size_t>(write.dst)]) &&
        intact(src_snapshots_[static_cast<size_t>(write.src)])) {
      continue;
    }
    chosen[w] = 0;
    left.push_back(static_cast<int64_t>(w));
  }
  swap(chosen);
  return left;
}

// Swaps the chosen writes: all, or none where one fails.
void Plan::swap(const std::vector<char>& chosen) {
  for (size_t i = 0; i < dst_snapshots_.size(); ++i) dst_snapshots_[i].impl->bump_version();
  for (size_t i = 0; i < src_snapshots_.size(); ++i) src_snapshots_[i].impl->bump_version();
  // Under a mode or a tracer every write has to be torch's own.
  const bool plain = plain_context();
  std::vector<uint32_t> by_torch;
  const auto keep = [&](const std::vector<uint32_t>& writes) {
    std::copy_if(writes.begin(), writes.end(), std::back_inserter(by_torch), [&](uint32_t w) { return chosen[w]; });
  };
  keep(native_);
  for (const Other& other : others_) keep(other.write_of);
  if (!plain) keep(task_write_);
  const at::NoGradGuard no_grad;
  const auto swap_one = [this](uint32_t w) {
    const Write& write = writes_[w];
    const at::Tensor dst = view(dsts_[static_cast<size_t>(write.dst)], write, true);
    const at::Tensor src = view(srcs_[static_cast<size_t>(write.src)], write, false);
    const at::Tensor kept = dst.clone();
    dst.copy_(src);
    src.copy_(kept);
  };
  size_t done = 0;
  try {
    for (; done < by_torch.size(); ++done) swap_one(by_torch[done]);
  } catch (...) {
    while (done > 0) swap_one(by_torch[--done]);
    throw;
  }
  Program program;
  program.dims = program_.dims;
  program.bytes = program_.bytes;
  for (size_t t = 0; plain && t < program_.tasks.size(); ++t) {
    if (chosen[task_write_[t]]) program.tasks.push_back(program_.tasks[t]);
  }
  exchange_tasks(program);
  ++exchanges_;
}

std::vector<int64_t> Plan::verify() const {
  std::vector<int64_t> differ;
  const std::vector<char> same = compare_tasks(program_);
  for (size_t t = 0; t < same.size(); ++t) {
    if (!same[t]) differ.push_back(task_write_[t]);
  }
  std::vector<uint32_t> by_torch = native_;
  for (const Other& other : others_) by_torch.insert(by_torch.end(), other.write_of.begin(), other.write_of.end());
  if (!by_torch.empty()) {
    const py::object same_bits = py::module_::import("paramkit.backend.native").attr("same_bits");
    for (uint32_t w : by_torch) {
      const Write& write = writes_[w];
      const at::Tensor dst = view(dsts_[static_cast<size_t>(write.dst)], write, true);
      const at::Tensor src = view(srcs_[static_cast<size_t>(write.src)], write, false);
      if (!same_bits(dst, src).cast<bool>()) differ.push_back(w);
    }
  }
  std::sort(differ.begin(), differ.end());
  return differ;
}

}  // namespace paramkit
