// The operators for torch's dispatcher, torch.ops.paramkit.*: what compiled graphs and other libraries
// call. The same checks and kernels as the Python functions, cut into the dispatcher's layers.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/batch.h"

namespace paramkit {

namespace {

using at::Scalar;
using at::Tensor;
using at::TensorList;

void check_lengths(const char* op, size_t dsts, size_t others) {
  TORCH_CHECK(dsts > 0 || others > 0, op, ": Tensor list must have at least one tensor.");
  TORCH_CHECK(dsts == others, op, ": lists must have the same length, got ", dsts, " and ", others);
}

// --- CPU: below autograd, the version counters are bumped already ------------------------------

void copy_all(const char* op, TensorList dsts, TensorList srcs, bool non_blocking) {
  check_lengths(op, dsts.size(), srcs.size());
  Batch batch;
  batch.set_autograd(Batch::Autograd::Below);
  for (size_t i = 0; i < dsts.size(); ++i) batch.copy({op, static_cast<int64_t>(i)}, dsts[i], srcs[i]);
  batch.run(non_blocking);
}

void fill_all(const char* op, TensorList dsts, at::ArrayRef<Scalar> values) {
  check_lengths(op, dsts.size(), values.size());
  Batch batch;
  batch.set_autograd(Batch::Autograd::Below);
  for (size_t i = 0; i < dsts.size(); ++i) {
    Batch::Number number{values[i]};
    batch.fill({op, static_cast<int64_t>(i)}, dsts[i], number);
  }
  batch.run(false);
}

void copy_cpu(const Tensor& dst, const Tensor& src, bool non_blocking) { copy_all("copy_", dst, src, non_blocking); }
void fill_cpu(const Tensor& dst, const Scalar& value) { fill_all("fill_", dst, value); }
void foreach_copy_cpu(TensorList dsts, TensorList srcs, bool non_blocking) {
  copy_all("foreach_copy_", dsts, srcs, non_blocking);
}
void foreach_fill_cpu(TensorList dsts, at::ArrayRef<Scalar> values) { fill_all("foreach_fill_", dsts, values); }

// --- Meta: shapes only, unless a tensor with memory is among them -----------------------------------

bool all_meta(TensorList tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.is_meta(); });
}

void foreach_copy_meta(TensorList dsts, TensorList srcs, bool non_blocking) {
  if (!all_meta(dsts)) return copy_all("foreach_copy_", dsts, srcs, non_blocking);
  check_lengths("foreach_copy_", dsts.size(), srcs.size());
  for (size_t i = 0; i < dsts.size(); ++i) (void)srcs[i].expand_as(dsts[i]);
}
void foreach_fill_meta(TensorList dsts, at::ArrayRef<Scalar> values) {
  if (!all_meta(dsts)) return fill_all("foreach_fill_", dsts, values);
  check_lengths("foreach_fill_", dsts.size(), values.size());
}
void copy_meta(const Tensor& dst, const Tensor& src, bool non_blocking) { foreach_copy_meta(dst, src, non_blocking); }
void fill_meta(const Tensor& dst, const Scalar& value) { foreach_fill_meta(dst, value); }

// --- ADInplaceOrView: a raw write tells autograd that a saved tensor is stale --------------------

void bump(TensorList dsts) {
  for (const Tensor& dst : dsts) dst.unsafeGetTensorImpl()->bump_version();
}

template <class Function>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

#define PARAMKIT_OP(name, function)                                        \
  const auto& name##_op() {                                                \
    static const auto handle = op<decltype(function)>("paramkit::" #name); \
    return handle;                                                         \
  }
PARAMKIT_OP(copy_, copy_cpu)
PARAMKIT_OP(fill_, fill_cpu)
PARAMKIT_OP(foreach_copy_, foreach_copy_cpu)
PARAMKIT_OP(foreach_fill_, foreach_fill_cpu)
#undef PARAMKIT_OP

void copy_inplace(const Tensor& dst, const Tensor& src, bool non_blocking) {
  bump(dst);
  const at::AutoDispatchBelowADInplaceOrView below;
  copy__op().call(dst, src, non_blocking);
}
void fill_inplace(const Tensor& dst, const Scalar& value) {
  bump(dst);
  const at::AutoDispatchBelowADInplaceOrView below;
  fill__op().call(dst, value);
}
void foreach_copy_inplace(TensorList dsts, TensorList srcs, bool non_blocking) {
  bump(dsts);
  const at::AutoDispatchBelowADInplaceOrView below;
  foreach_copy__op().call(dsts, srcs, non_blocking);
}
void foreach_fill_inplace(TensorList dsts, at::ArrayRef<Scalar> values) {
  bump(dsts);
  const at::AutoDispatchBelowADInplaceOrView below;
  foreach_fill__op().call(dsts, values);
}

// --- Autograd: what native autograd would record goes to torch's own copy_ and fill_, pair by pair --

void foreach_copy_autograd(TensorList dsts, TensorList srcs, bool non_blocking) {
  check_lengths("foreach_copy_", dsts.size(), srcs.size());
  bool recorded = false;
  for (size_t i = 0; i < dsts.size(); ++i) recorded |= needs_autograd(dsts[i], srcs[i].unsafeGetTensorImpl());
  if (recorded) {
    Batch batch;
    for (size_t i = 0; i < dsts.size(); ++i) batch.copy({"foreach_copy_", static_cast<int64_t>(i)}, dsts[i], srcs[i]);
    return batch.run(non_blocking);
  }
  const at::AutoDispatchBelowAutograd below;
  foreach_copy__op().call(dsts, srcs, non_blocking);
}
void foreach_fill_autograd(TensorList dsts, at::ArrayRef<Scalar> values) {
  check_lengths("foreach_fill_", dsts.size(), values.size());
  bool recorded = false;
  for (const Tensor& dst : dsts) recorded |= needs_autograd(dst, nullptr);
  if (recorded) {
    Batch batch;
    for (size_t i = 0; i < dsts.size(); ++i) {
      Batch::Number number{values[i]};
      batch.fill({"foreach_fill_", static_cast<int64_t>(i)}, dsts[i], number);
    }
    return batch.run(false);
  }
  const at::AutoDispatchBelowAutograd below;
  foreach_fill__op().call(dsts, values);
}
void copy_autograd(const Tensor& dst, const Tensor& src, bool non_blocking) {
  if (needs_autograd(dst, src.unsafeGetTensorImpl())) return foreach_copy_autograd(dst, src, non_blocking);
  const at::AutoDispatchBelowAutograd below;
  copy__op().call(dst, src, non_blocking);
}
void fill_autograd(const Tensor& dst, const Scalar& value) {
  if (needs_autograd(dst, nullptr)) return foreach_fill_autograd(dst, value);
  const at::AutoDispatchBelowAutograd below;
  fill__op().call(dst, value);
}

// --- vmap and functionalization: torch's own copy_ and fill_, one by one -----------------------------
// They have the rules for batched tensors. And compiled code keeps an operator of others as one step that reads
// before it writes, which a list that shares memory is not; it also takes views of inputs with an offset of their
// own for other elements (torch 2.13).

void foreach_copy_single(TensorList dsts, TensorList srcs, bool non_blocking) {
  check_lengths("foreach_copy_", dsts.size(), srcs.size());
  for (size_t i = 0; i < dsts.size(); ++i) dsts[i].copy_(srcs[i], non_blocking);
}
void foreach_fill_single(TensorList dsts, at::ArrayRef<Scalar> values) {
  check_lengths("foreach_fill_", dsts.size(), values.size());
  for (size_t i = 0; i < dsts.size(); ++i) dsts[i].fill_(values[i]);
}
void copy_single(const Tensor& dst, const Tensor& src, bool non_blocking) {
  foreach_copy_single(dst, src, non_blocking);
}
void fill_single(const Tensor& dst, const Scalar& value) { foreach_fill_single(dst, value); }

}  // namespace

}  // namespace paramkit

TORCH_LIBRARY(paramkit, m) {
  m.def("copy_(Tensor(a!) dst, Tensor src, bool non_blocking=False) -> ()");
  m.def("fill_(Tensor(a!) dst, Scalar value) -> ()");
  m.def("foreach_copy_(Tensor(a!)[] dsts, Tensor[] srcs, bool non_blocking=False) -> ()");
  m.def("foreach_fill_(Tensor(a!)[] dsts, Scalar[] values) -> ()");
}

#define PARAMKIT_IMPL(key, layer)                                      \
  TORCH_LIBRARY_IMPL(paramkit, key, m) {                               \
    m.impl("copy_", TORCH_FN(paramkit::copy_##layer));                 \
    m.impl("fill_", TORCH_FN(paramkit::fill_##layer));                 \
    m.impl("foreach_copy_", TORCH_FN(paramkit::foreach_copy_##layer)); \
    m.impl("foreach_fill_", TORCH_FN(paramkit::foreach_fill_##layer)); \
  }
PARAMKIT_IMPL(CPU, cpu)
PARAMKIT_IMPL(CUDA, cpu)  // a batch knows where its tensors are
PARAMKIT_IMPL(Meta, meta)
PARAMKIT_IMPL(ADInplaceOrView, inplace)
PARAMKIT_IMPL(Autograd, autograd)
PARAMKIT_IMPL(FuncTorchBatched, single)
PARAMKIT_IMPL(Functionalize, single)

// torch's fallbacks for conjugate and negative tensors refuse lists that are written. The kernels send
// such tensors to torch's own copy_ by themselves.
TORCH_LIBRARY_IMPL(paramkit, Conjugate, m) {
  m.impl("foreach_copy_", torch::CppFunction::makeFallthrough());
  m.impl("foreach_fill_", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(paramkit, Negative, m) {
  m.impl("foreach_copy_", torch::CppFunction::makeFallthrough());
  m.impl("foreach_fill_", torch::CppFunction::makeFallthrough());
}
