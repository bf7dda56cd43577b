// Kernels for operators of torch's own, aten::copy_ and others, behind a flag: see patch.h.
//
// copy_ and _foreach_copy_ have no kernel for the CPU in torch, only one for every device; fill_ has one.
// They come after autograd, views and version counters, functorch and every mode: what reaches them is a
// write that nobody else has a say in. Whatever the kernels do not take, or gain nothing by, goes to the
// function that torch would have called, so values, errors and their order are torch's.
#include "torch/patch.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_foreach_copy_native.h>
#include <ATen/ops/copy.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/fill_native.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <string>
#include <utility>

#include "torch/scratch.h"
#include "torch/tensors.h"
#include "torch/threads.h"

namespace paramkit {

namespace {

using at::Scalar;
using at::Tensor;
using at::TensorList;

std::atomic<bool> patched{false};

// Smaller writes stay with torch: finding out that the kernels take them costs what they would gain.
std::atomic<size_t> least_bytes{512};

// Of a list's copies, how many are looked at together after one that is torch's.
constexpr size_t kFewest = 8;

// Within such a write, what the library asks torch to write, an element to see what becomes of it, is torch's.
bool worthwhile(const Tensor& dst) {
  return patched.load(std::memory_order_relaxed) && dst.defined() && dst.has_storage() &&
         dst.nbytes() >= least_bytes.load(std::memory_order_relaxed) && !KeepGil::kept();
}

at::TensorImpl* impl_of(const Tensor& tensor) { return tensor.defined() ? tensor.unsafeGetTensorImpl() : nullptr; }

// Of _foreach_copy_: its layer of autograd leaves the version counters, and what it did not want to see, to
// the copy_ of every pair, which is what this stands for.
Batch::Autograd layer() {
  if (c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::ADInplaceOrView)) return Batch::Autograd::Below;
  const bool below_autograd = c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradCPU);
  return below_autograd ? Batch::Autograd::Ignore : Batch::Autograd::Follow;
}

// The first of the copies that the kernels can do, done. The GIL is kept: whoever calls torch with it
// does not expect to lose it.
size_t copy_first(TensorList dsts, TensorList srcs, Batch::Autograd autograd) {
  const KeepGil kept;
  const Scratch batch;
  batch->set_autograd(autograd);
  const size_t n = dsts.size();
  const size_t done = batch->copy_plain(
      n, pieces_of(n), [&](size_t i) { return impl_of(dsts[i]); },
      [&](size_t i) { return static_cast<const at::TensorImpl*>(impl_of(srcs[i])); });
  if (done > 0) batch->run(false);
  return done;
}

// The kernels take a pair of dtypes once torch is known to convert it. False if it is known already, or is
// not for the kernels.
bool learn_conversion(const Tensor& dst, const Tensor& src) {
  if (!src.defined() || conversion_known(dst.scalar_type(), src.scalar_type())) return false;
  const KeepGil kept;
  Type to{}, from{};
  if (!kernel_types(dst.scalar_type(), src.scalar_type(), to, from)) return false;
  try {
    check_conversion(dst.scalar_type(), src.scalar_type());
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

// Whether a conversion is torch's: of dtypes that the kernels do not know, or between float16 and float32 one to one,
// which torch does without an iterator (16 x 16 in 0.5 us, the kernels in 0.7; 64 MiB are the same).
bool converted_by_torch(const Tensor& dst, const Tensor& src) {
  const auto to = dst.scalar_type(), from = src.scalar_type();
  if (to == from) return false;
  const bool half = (to == at::kHalf && from == at::kFloat) || (to == at::kFloat && from == at::kHalf);
  if (half) return dst.is_contiguous() && src.is_contiguous() && dst.numel() == src.numel();
  Type to_type{}, from_type{};
  return !kernel_types(to, from, to_type, from_type);
}

bool copied(const Tensor& dst, const Tensor& src) {
  const auto copy = [&] { return copy_first(dst, src, Batch::Autograd::Below) == 1; };
  return worthwhile(dst) && src.defined() && !converted_by_torch(dst, src) &&
         (copy() || (learn_conversion(dst, src) && copy()));
}

Tensor& copy_(Tensor& dst, const Tensor& src, bool non_blocking) {
  if (copied(dst, src)) return dst;
  return at::native::copy_(dst, src, non_blocking);
}

Tensor& fill_(Tensor& dst, const Scalar& value) {
  if (worthwhile(dst)) {
    const KeepGil kept;
    const Scratch batch;
    batch->set_autograd(Batch::Autograd::Below);
    if (batch->fill_plain(dst, value)) {
      batch->run(false);
      return dst;
    }
  }
  return at::native::fill_(dst, value);
}

void foreach_copy_(TensorList dsts, TensorList srcs, bool non_blocking) {
  if (!patched.load(std::memory_order_relaxed) || dsts.empty() || dsts.size() != srcs.size()) {
    return at::native::foreach_tensor_copy_list_kernel_slow_(dsts, srcs, non_blocking);
  }
  // As torch's loop: in order, and what comes before an error is written. A copy that is torch's ends a batch;
  // after that batches begin small, or a list of such copies would be looked at again from each of them.
  const Batch::Autograd autograd = layer();
  size_t most = dsts.size();
  const auto copy = [&](size_t first) {
    const size_t n = std::min(most, dsts.size() - first);
    const size_t done = copy_first(dsts.slice(first, n), srcs.slice(first, n), autograd);
    most = done == n ? 2 * n : kFewest;
    return done;
  };
  for (size_t i = 0; i < dsts.size();) {
    const size_t done = copy(i);
    i += done;
    if (done > 0 || i == dsts.size()) continue;
    if (dsts[i].defined() && learn_conversion(dsts[i], srcs[i])) continue;
    dsts[i].copy_(srcs[i], non_blocking);
    ++i;
  }
}

// torch warns that a kernel replaces another one, which is what was asked for.
class Silent : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Whether what the CPU's calls come to now is torch's own: that is what our kernels pass on to.
bool is_torchs_own(const c10::OperatorHandle& op) {
  const std::string table = op.dumpComputedTable();  // a line for each key: "CPU: registered at FILE:LINE [kind]"
  const size_t begin = table.find("\nCPU: ");
  const std::string line =
      begin == std::string::npos ? table : table.substr(begin, table.find('\n', begin + 1) - begin);
  return line.find("/RegisterC") != std::string::npos;  // RegisterCPU, RegisterCompositeExplicitAutograd
}

void add_kernels() {
  constexpr std::pair<const char*, const char*> kOperators[] = {
      {"aten::copy_", ""}, {"aten::fill_", "Scalar"}, {"aten::_foreach_copy_", ""}};
  for (const auto& [name, overload] : kOperators) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
    TORCH_CHECK(
        is_torchs_own(op), "patch_torch: another library has a kernel of its own for ", name,
        " on the CPU, which would be hidden. Remove that one first, or call paramkit.copy_, paramkit.fill_ and ",
        "paramkit.foreach_copy_ directly");
  }
  Silent silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static auto* library = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("copy_", TORCH_FN(copy_));
  library->impl("fill_.Scalar", TORCH_FN(fill_));
  library->impl("_foreach_copy_", TORCH_FN(foreach_copy_));
}

}  // namespace

void patch_torch(bool on) {
  if (on) {
    // Not made by a call that throws: the next one tries again. (Of std::call_once not every library keeps to that.)
    static const bool added = (add_kernels(), true);
    (void)added;
  }
  patched = on;
}

size_t set_patch_least_bytes(size_t bytes) { return least_bytes.exchange(bytes); }

}  // namespace paramkit
