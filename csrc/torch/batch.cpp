#include "torch/batch.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "core/overlap.h"
#include "cuda/pack.h"
#include "torch/threads.h"

namespace paramkit {

void Routes::add(const Elsewhere& writes) {
  if (!writes.transfers()) return add(writes.writes());
  staged += static_cast<int64_t>(writes.size());
  casts += writes.writes().casts;
}

Routes& routes() {
  static thread_local Routes counts{};
  return counts;
}

namespace {

std::string entry(const char* list, const char* single, int64_t index) {
  return index < 0 ? std::string(single) : std::string(list) + "[" + std::to_string(index) + "]";
}
std::string dst_name(const Batch::Place& at) { return entry("dsts", "dst", at.index); }
std::string src_name(const Batch::Place& at) { return entry("srcs", "src", at.index); }
std::string value_name(const Batch::Place& at) { return entry("values", "value", at.index); }

// `dst <- src`, the source broadcast to the destination's shape: one look at every dimension.
struct Pair {
  Dim dims[kMaxRank];
  int rank;
  bool fits = true;      // the source broadcasts
  bool repeats = false;  // the destination is expanded: one element stands for several
  Range to, from;        // the memory of both, if there are elements

  Pair(const at::TensorImpl& dst, const at::TensorImpl& src) : rank(static_cast<int>(dst.dim())) {
    const auto sizes = dst.sizes(), strides = dst.strides(), src_sizes = src.sizes(), src_strides = src.strides();
    const auto width = static_cast<int64_t>(dst.itemsize()), src_width = static_cast<int64_t>(src.itemsize());
    const int missing = rank - static_cast<int>(src_sizes.size());
    fits = missing >= 0;
    int64_t reach = width, src_reach = src_width;
    for (int i = 0; fits && i < rank; ++i) {
      const auto d = static_cast<size_t>(i), s = static_cast<size_t>(i - missing);
      Dim& dim = dims[i];
      dim = {sizes[d], strides[d] * width, 0};
      if (i >= missing && src_sizes[s] != 1) {
        fits = src_sizes[s] == dim.size;
        dim.src = src_strides[s] * src_width;
      }
      repeats |= dim.dst == 0 && dim.size != 1;
      reach += (dim.size - 1) * dim.dst;
      src_reach += (dim.size - 1) * dim.src;
    }
    to = {data(dst), data(dst) + reach};
    from = {data(src), data(src) + src_reach};
  }

  // Whether one element of the source is all there is of it.
  bool fills() const { return cuda::one_element(dims, rank); }
};

bool broadcasts(const at::TensorImpl& dst, const at::TensorImpl& src) {
  const auto missing = dst.dim() - src.dim();
  if (missing < 0) return false;
  for (int64_t i = 0; i < src.dim(); ++i) {
    if (src.sizes()[i] != 1 && src.sizes()[i] != dst.sizes()[i + missing]) return false;
  }
  return true;
}

// What a check was about, put into words only when it fails.
std::string pair_name(const Batch::Place& at) { return src_name(at) + " into " + dst_name(at); }
std::string fill_name(const Batch::Place& at) { return value_name(at) + " into " + dst_name(at); }

template <class Check>
void in_context(const Batch::Place& place, std::string (*what)(const Batch::Place&), Check check) {
  try {
    check();
  } catch (c10::Error& error) {
    error.add_context(std::string("in paramkit.") + place.op + ", " + what(place));
    throw;
  } catch (const std::runtime_error& error) {  // c10's overflow of a number
    TORCH_CHECK(false, place.op, ": ", what(place), ": ", error.what());
  }
}

void check_memory(const Batch::Place& place, std::string (*name)(const Batch::Place&), const at::TensorImpl& impl) {
  TORCH_CHECK(has_memory(impl), place.op, ": ", name(place),
              " has a shape but no memory (its storage was resized, as FSDP does): gather it first");
}

}  // namespace

void Batch::check_version(Place place, Access how) const {
  TORCH_CHECK(how != Access::Inference || autograd_ == Autograd::Below || c10::InferenceMode::is_enabled(), place.op,
              ": ", dst_name(place),
              " is an inference tensor. Inplace update to inference tensor outside InferenceMode is not allowed: "
              "clone it, or write inside torch.inference_mode()");
}

bool Batch::records(const at::Tensor& dst, const at::TensorImpl* src) const {
  return autograd_ == Autograd::Follow && needs_autograd(dst, src);
}

namespace {

// torch fills no sparse tensor from a tensor, and no COO tensor at all. A subclass may have ways of its own.
void check_layout(const Batch::Place& place, const at::Tensor& dst, bool number) {
  const auto layout = dst.layout();
  const bool has_fill = layout == c10::kStrided || (number && layout != c10::kSparse);
  TORCH_CHECK_NOT_IMPLEMENTED(has_fill || dst.key_set().has(c10::DispatchKey::Python), place.op, ": torch fills no ",
                              layout, " tensor from a ", number ? "number" : "tensor", ", and ", dst_name(place),
                              " is one");
}

}  // namespace

void Batch::check_native(Place place, const at::Tensor& dst, const at::Tensor& src) const {
  TORCH_CHECK_NOT_IMPLEMENTED(!src.is_meta() || dst.is_meta(), place.op, ": Cannot copy out of meta tensor; no data! ",
                              src_name(place), " is on the meta device: load its values first");
  if (dst.layout() != c10::kStrided || !has_shape(dst) || !has_shape(src)) return;
  TORCH_CHECK(broadcasts(*dst.unsafeGetTensorImpl(), *src.unsafeGetTensorImpl()), place.op, ": ", src_name(place),
              " of shape ", src.sizes(), " does not broadcast to ", dst_name(place), " of shape ", dst.sizes());
  in_context(place, dst_name, [&] { records(dst, src.unsafeGetTensorImpl()); });
}

void Batch::check_native_fill(Place place, const at::Tensor& dst, const at::Tensor& value) const {
  check_layout(place, dst, false);
  TORCH_CHECK(value.dim() == 0, place.op, ": fill_ only supports 0-dimension value tensor but got ", value_name(place),
              " with ", value.dim(), " dimensions");
  TORCH_CHECK_NOT_IMPLEMENTED(!value.is_meta() || dst.is_meta(), place.op, ": ", value_name(place),
                              " is on the meta device: no data to fill with");
  in_context(place, dst_name, [&] { records(dst, value.unsafeGetTensorImpl()); });
}

void Batch::check_native(Place place, const at::Tensor& dst, const c10::Scalar& value) const {
  check_layout(place, dst, true);
  in_context(place, fill_name, [&] {
    char bytes[16];
    if (!c10::isQIntType(dst.scalar_type()))
      scalar_bytes(value, dst.scalar_type(), has_shape(dst) ? dst.numel() : 2, bytes);
    records(dst, nullptr);
  });
}

void Batch::defer(Deferred deferred) {
  deferred_.push_back(std::move(deferred));
  step(kNative);
}

void Batch::defer_copy(const at::Tensor& dst, const at::Tensor& src) {
  if (autograd_ != Autograd::Ignore) return defer({dst, src, {}, false, false, {}});
  defer({dst.detach(), src.detach(), {}, false, false, {}});
}

// Both plain, nothing for autograd to record: straight to torch's kernel, as _foreach_copy_ does.
void Batch::defer_cast(const at::Tensor& dst, const at::Tensor& src) {
  defer({dst, src, {}, false, true, {}});
  bumps_.push_back(dst.unsafeGetTensorImpl());
}

void Batch::defer_fill(const at::Tensor& dst, const c10::Scalar& value) { defer({dst, {}, value, true, false, {}}); }

void Batch::defer(std::function<void(bool)> write) { defer({{}, {}, {}, false, false, std::move(write)}); }

void Batch::Deferred::write(bool non_blocking) const {
  if (call) return call(non_blocking);
  if (raw) {
    const at::AutoDispatchBelowADInplaceOrView below;
    dst.copy_(src, non_blocking);
  } else if (!fill) {
    dst.copy_(src, non_blocking);
  } else if (value) {
    dst.fill_(*value);
  } else {
    dst.fill_(src);
  }
}

bool Batch::add_strided(const at::TensorImpl& to, const at::TensorImpl& from, int where, bool grad_mode,
                        Program& program) const {
  if (!plain(to, from, where, grad_mode) || to.numel() == 0) return false;
  const auto to_type = c10::typeMetaToScalarType(to.dtype()), from_type = c10::typeMetaToScalarType(from.dtype());
  Type to_kernel{}, from_kernel{};
  if (!conversion_known(to_type, from_type) || !kernel_types(to_type, from_type, to_kernel, from_kernel)) return false;
  const Pair pair(to, from);
  if (where != devices::kHost && !cuda::takes(data(to), data(from), to_kernel, from_kernel, pair.fills())) return false;
  return pair.fits && !pair.repeats && !pair.to.meets(pair.from) &&
         program.add(data(to), data(from), to_kernel, from_kernel, pair.dims, pair.rank);
}

namespace {

// Between two devices torch's own copy_ knows the way, peer to peer where that is enabled.
bool reachable(const devices::Home& to, const devices::Home& from) {
  return to.where != devices::kNowhere && from.where != devices::kNowhere &&
         (to.where == from.where || to.where == devices::kHost || from.where == devices::kHost);
}

// A transfer that gains nothing by a slot: a small one by itself, or a large one between dense memory of one
// dtype that is pinned already. Asking whether it is costs about a microsecond.
constexpr int64_t kSmallTransfer = 64 << 10, kAskPinned = 1 << 20;

bool goes_directly(const Batch::Place& place, const devices::Home& to, const at::Tensor& dst, const devices::Home& from,
                   const at::Tensor& src) {
  if (to.where == from.where || devices::any_emulated || dst.scalar_type() != src.scalar_type() ||
      dst.sizes() != src.sizes() || !dst.is_contiguous() || !src.is_contiguous()) {
    return false;
  }
  const auto bytes = static_cast<int64_t>(dst.nbytes());
  if (place.index < 0 && bytes <= kSmallTransfer) return true;
  return bytes >= kAskPinned && (to.where == devices::kHost ? dst : src).is_pinned();
}

// Whether two tensors are views of the same elements in the same order, by torch's own rule.
bool same_view(const at::TensorImpl& a, const at::TensorImpl& b) {
  return a.dtype() == b.dtype() && a.storage_offset() == b.storage_offset() && a.sizes() == b.sizes() &&
         a.strides() == b.strides() && a.storage().is_alias_of(b.storage());
}

}  // namespace

uint32_t Batch::list_of(int dst_home, int src_home) {
  if (dst_home == devices::kHost && src_home == devices::kHost) return kCpu;
  return static_cast<uint32_t>(kOthers + index_of(others_, dst_home, src_home));
}

// False if the kernels do not take it, which torch's own copy_ then does.
bool Batch::add_write(int dst_home, int src_home, char* dst, const char* src, Type to, Type from, const Dim* dims,
                      int rank, bool number) {
  const uint32_t list = list_of(dst_home, src_home);
  const bool added = list == kCpu ? program_.add(dst, src, to, from, dims, rank)
                                  : other(list).add(dst, src, to, from, dims, rank, number);
  if (added) step(list);
  return added;
}

void Batch::copy(Place place, const at::Tensor& dst, const at::Tensor& src) {
  const at::TensorImpl& to = *dst.unsafeGetTensorImpl();
  const at::TensorImpl& from = *src.unsafeGetTensorImpl();
  if (!devices::any_emulated && add_dense(to, from, devices::kHost, at::GradMode::is_enabled(), program_)) {
    step(kCpu);
    return bumps_.push_back(dst.unsafeGetTensorImpl());
  }
  const devices::Home to_home = devices::home(to, true), from_home = devices::home(from, false);
  if (!reachable(to_home, from_home) || goes_directly(place, to_home, dst, from_home, src)) {
    check_native(place, dst, src);
    if (to_home.where != devices::kNowhere) {
      check_version(place, to_home.access);
      check_memory(place, dst_name, to);
    }
    if (from_home.where != devices::kNowhere) check_memory(place, src_name, from);
    return defer_copy(dst, src);
  }
  copy_strided(place, dst, to_home, src, from_home);
}

void Batch::copy_strided(Place place, const at::Tensor& dst, devices::Home to_home, const at::Tensor& src,
                         devices::Home from_home) {
  const at::TensorImpl& to = *dst.unsafeGetTensorImpl();
  const at::TensorImpl& from = *src.unsafeGetTensorImpl();
  const Pair pair(to, from);
  TORCH_CHECK(pair.fits, place.op, ": ", src_name(place), " of shape ", from.sizes(), " does not broadcast to ",
              dst_name(place), " of shape ", to.sizes());
  check_version(place, to_home.access);
  if (&to == &from || (pair.repeats && same_view(to, from))) {  // which torch looks for first: no value moves
    in_context(place, dst_name, [&] { records(dst, &from); });
    return defer_copy(dst, src);
  }
  const bool written = to.numel() > 0;
  TORCH_CHECK(!written || !pair.repeats, place.op, ": unsupported operation: more than one element of ",
              dst_name(place), " refers to a single memory location (shape ", to.sizes(), ", stride ", to.strides(),
              "). Please clone() the tensor before performing the operation.");
  check_memory(place, dst_name, to);
  check_memory(place, src_name, from);
  const bool meets = written && pair.to.meets(pair.from);
  if (meets) {
    TORCH_CHECK(at::get_overlap_status(&to, &from) != at::MemOverlapStatus::Partial, place.op,
                ": unsupported operation: some elements of ", src_name(place), " and ", dst_name(place),
                " refer to a single memory location. Please clone() the tensor before performing the operation.");
  }
  const auto to_type = c10::typeMetaToScalarType(to.dtype()), from_type = c10::typeMetaToScalarType(from.dtype());
  if (written && !conversion_known(to_type, from_type)) {
    in_context(place, pair_name, [&] { check_conversion(to_type, from_type); });
  }
  bool recorded = false;
  if (autograd_ == Autograd::Follow && (to.autograd_meta() != nullptr || from.autograd_meta() != nullptr)) {
    in_context(place, dst_name, [&] { recorded = records(dst, &from); });
  }
  if (recorded || meets) return defer_copy(dst, src);
  Type to_kernel{}, from_kernel{};
  if (!kernel_types(to_type, from_type, to_kernel, from_kernel)) return defer_cast(dst, src);
  // Destinations that may hold one element twice (as_strided windows) keep torch's order of writes.
  if (written && !add_write(to_home.where, from_home.where, data(to), data(from), to_kernel, from_kernel, pair.dims,
                            pair.rank, false)) {
    return defer_copy(dst, src);
  }
  bumps_.push_back(dst.unsafeGetTensorImpl());
}

const char* Batch::element(Number& number, c10::ScalarType type, int64_t numel) {
  const int64_t few = std::min<int64_t>(numel, 2);
  if (number.bytes == nullptr || number.type != type || number.few != few) {
    elements_.emplace_back();
    scalar_bytes(number.value, type, numel, elements_.back().data());
    number.type = type;
    number.few = few;
    number.bytes = elements_.back().data();
  }
  return number.bytes;
}

void Batch::fill(Place place, const at::Tensor& dst, Number& number) {
  const at::TensorImpl& to = *dst.unsafeGetTensorImpl();
  const devices::Home home = devices::home(to, true);
  if (home.where == devices::kNowhere) {
    check_native(place, dst, number.value);
    return defer_fill(dst, number.value);
  }
  check_version(place, home.access);
  const bool written = to.numel() > 0;
  check_memory(place, dst_name, to);
  const char* bytes = nullptr;
  bool recorded = false;
  in_context(place, fill_name, [&] {
    // torch converts for one element by itself on the CPU alone.
    const int64_t numel = to.is_cpu() ? to.numel() : std::max<int64_t>(to.numel(), 2);
    bytes = element(number, c10::typeMetaToScalarType(to.dtype()), numel);
    recorded = records(dst, nullptr);
  });
  if (recorded || (written && !add_fill(to, home.where, bytes))) return defer_fill(dst, number.value);
  bumps_.push_back(dst.unsafeGetTensorImpl());
}

// False if the kernels do not take it.
bool Batch::add_fill(const at::TensorImpl& to, int where, const char* element) {
  Dim dims[kMaxRank];
  const int rank = static_cast<int>(to.dim());
  const auto width = static_cast<int64_t>(to.itemsize());
  const Type type = bytes_of_width(width);
  const auto sizes = to.sizes(), strides = to.strides();
  for (int i = 0; i < rank; ++i) dims[i] = {sizes[i], strides[i] * width, 0};
  // The number is on the host; where there are devices it is taken along with the task.
  return add_write(where, where, data(to), element, type, type, dims, rank, true);
}

bool Batch::fill_plain(const at::Tensor& dst, const c10::Scalar& value) {
  const at::TensorImpl& to = *dst.unsafeGetTensorImpl();
  const devices::Home home = devices::home(to, true);
  if (home.where == devices::kNowhere || !writable(home.access) || !has_memory(to) || to.numel() == 0 ||
      value.isSymbolic() || (autograd_ == Autograd::Follow && on_autograd(to, at::GradMode::is_enabled()))) {
    return false;
  }
  Number number{value};
  const char* bytes = nullptr;
  try {
    bytes = element(number, c10::typeMetaToScalarType(to.dtype()), to.numel());
  } catch (const std::exception&) {
    return false;  // torch says it better
  }
  if (!add_fill(to, home.where, bytes)) return false;
  bumps_.push_back(dst.unsafeGetTensorImpl());
  return true;
}

void Batch::fill(Place place, const at::Tensor& dst, const at::Tensor& value) {
  const bool same_memory = dst.has_storage() && value.has_storage() && dst.is_alias_of(value);
  const devices::Home to = devices::home(*dst.unsafeGetTensorImpl(), true);
  const devices::Home from = devices::home(*value.unsafeGetTensorImpl(), false);
  // A number on another device is fetched by torch, which fill_ does with care.
  const bool plain =
      to.where != devices::kNowhere && to.where == from.where && at::has_internal_overlap(dst) != at::MemOverlap::Yes;
  if (plain && !same_memory && value.dim() == 0) return copy(place, dst, value);
  check_native_fill(place, dst, value);
  // On one device torch's fill_ with a tensor is copy_, which refuses what is expanded; with a number it does not.
  TORCH_CHECK(to.where == devices::kNowhere || dst.device() != value.device() || dst.numel() == 0 ||
                  at::has_internal_overlap(dst) != at::MemOverlap::Yes,
              place.op, ": unsupported operation: more than one element of ", dst_name(place),
              " refers to a single memory location (shape ", dst.sizes(), ", stride ", dst.strides(),
              "). Please clone() the tensor before performing the operation.");
  if (to.where != devices::kNowhere) check_memory(place, dst_name, *dst.unsafeGetTensorImpl());
  if (from.where != devices::kNowhere) check_memory(place, value_name, *value.unsafeGetTensorImpl());
  const auto to_type = dst.scalar_type(), from_type = value.scalar_type();
  if (to.where != devices::kNowhere && from.where != devices::kNowhere && !conversion_known(to_type, from_type)) {
    in_context(place, fill_name, [&] { check_conversion(to_type, from_type); });
  }
  // As torch does: a number of the host's is taken along, where autograd has nothing to record.
  if (to.where >= 0 && from.where == devices::kHost && !devices::any_emulated &&
      !on_autograd(*value.unsafeGetTensorImpl(), at::GradMode::is_enabled())) {
    Number number{value.item()};
    return fill(place, dst, number);
  }
  defer({dst, value, {}, true, false, {}});
}

bool Batch::runs_python() const { return program_.bytes >= kReleaseGil || !deferred_.empty() || !others_.empty(); }

void Batch::run(bool non_blocking) {
  for (const Elsewhere& other : others_) other.check();
  if (autograd_ != Autograd::Below) {
    bump_versions(bumps_.size(), [this](size_t i) { return bumps_[i]; });
  }
  routes().add(program_);
  routes().native += static_cast<int64_t>(deferred_.size());
  for (const Elsewhere& other : others_) routes().add(other);
  if (steps_.size() == 1 && steps_[0].list == kCpu) return run_tasks(program_, 0, program_.tasks.size(), false);
  std::vector<size_t> done(kOthers + others_.size());
  // From one pair of torch's to the next.
  for (size_t first = 0, last = 0; first < steps_.size(); first = last) {
    for (last = first + 1; last < steps_.size() && steps_[first].list != kNative && steps_[last].list != kNative;) {
      ++last;
    }
    if (last - first == 1 || !apart(first, last, done)) {
      for (size_t s = first; s < last; ++s) run_list(steps_[s].list, steps_[s].count, done, non_blocking);
      continue;
    }
    // Lists that have nothing to do with each other: one launch a device, however they alternate. The CPU's last,
    // while the devices are at work.
    for (uint32_t list = static_cast<uint32_t>(done.size()); list-- > 0;) {
      size_t count = 0;
      for (size_t s = first; s < last; ++s) count += steps_[s].list == list ? steps_[s].count : 0;
      if (count > 0) run_list(list, count, done, non_blocking);
    }
  }
}

// The next `count` of a list.
void Batch::run_list(uint32_t list, size_t count, std::vector<size_t>& done, bool non_blocking) {
  const size_t first = done[list], last = first + count;
  done[list] = last;
  if (list >= kOthers) return other(list).run(first, last, non_blocking);
  if (list == kCpu) return run_tasks(program_, first, last, false);
  for (size_t i = first; i < last; ++i) deferred_[i].write(non_blocking);
}

// Whether none of the next steps has to do with another list's.
bool Batch::apart(size_t first, size_t last, std::vector<size_t> done) const {
  std::vector<Tasks> all;
  for (size_t s = first; s < last; ++s) {
    const Step& step = steps_[s];
    all.push_back({step.list == kCpu ? &program_ : &others_[step.list - kOthers].writes(), done[step.list],
                   done[step.list] + step.count});
    done[step.list] += step.count;
  }
  return !share_memory(all);
}

void Batch::clear() {
  autograd_ = Autograd::Follow;
  program_.clear();
  for (Program& part : parts_) part.clear();  // not empty after an exception
  bumps_.clear();
  deferred_.clear();
  others_.clear();
  steps_.clear();
  elements_.clear();
}

}  // namespace paramkit
