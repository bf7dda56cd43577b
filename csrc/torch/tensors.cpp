#include "torch/tensors.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace paramkit {

Range range(const at::TensorImpl& impl) {
  const char* begin = data(impl);
  if (impl.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < impl.dim(); ++i) last += (impl.sizes()[i] - 1) * impl.strides()[i];
  return {begin, begin + (last + 1) * static_cast<int64_t>(impl.itemsize())};
}

namespace {

// Found by trying, once: torch's own answer, whatever its version.
std::atomic<bool>& works(c10::ScalarType dst, c10::ScalarType src) {
  constexpr int n = static_cast<int>(c10::ScalarType::NumOptions);
  static std::atomic<bool> table[n][n];
  return table[static_cast<int>(dst)][static_cast<int>(src)];
}

}  // namespace

bool conversion_known(c10::ScalarType dst, c10::ScalarType src) {
  return works(dst, src).load(std::memory_order_relaxed);
}

void check_conversion(c10::ScalarType dst, c10::ScalarType src) {
  if (conversion_known(dst, src)) return;
  c10::InferenceMode guard;  // one element, invisible to autograd
  at::empty({1}, at::TensorOptions().dtype(dst)).copy_(at::empty({1}, at::TensorOptions().dtype(src)));
  works(dst, src).store(true, std::memory_order_relaxed);
}

namespace {

template <class T>
void put(T value, char* bytes) {
  std::memcpy(bytes, &value, sizeof(T));
}

}  // namespace

void scalar_bytes(const c10::Scalar& value, c10::ScalarType type, int64_t numel, char* bytes) {
  switch (type) {
    case c10::ScalarType::Float: return put(value.to<float>(), bytes);
    case c10::ScalarType::Double: return put(value.to<double>(), bytes);
    case c10::ScalarType::Int: return put(value.to<int32_t>(), bytes);
    case c10::ScalarType::Long: return put(value.to<int64_t>(), bytes);
    default: break;
  }
  if (numel != 1 && type == c10::ScalarType::Half) return put(value.to<c10::Half>(), bytes);
  if (numel != 1 && type == c10::ScalarType::BFloat16) return put(value.to<c10::BFloat16>(), bytes);
  c10::InferenceMode guard;
  const auto few = at::empty({std::min<int64_t>(numel, 2)}, at::TensorOptions().dtype(type)).fill_(value);
  if (numel > 0) std::memcpy(bytes, few.const_data_ptr(), few.element_size());
}

bool on_autograd(const at::TensorImpl& impl, bool grad_mode) {
  // Most tensors carry no autograd metadata at all.
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(impl.autograd_meta());
  if (meta == nullptr) return false;
  return (grad_mode && meta->requires_grad()) || (meta->fw_grad_ != nullptr && !meta->fw_grad_->empty());
}

bool needs_autograd(const at::Tensor& dst, const at::TensorImpl* src) {
  const bool grad_mode = at::GradMode::is_enabled();
  if (!on_autograd(*dst.unsafeGetTensorImpl(), grad_mode) && (src == nullptr || !on_autograd(*src, grad_mode))) {
    return false;
  }
  torch::autograd::check_inplace(dst, dst.requires_grad() || (src != nullptr && src->requires_grad()));
  return true;
}

bool plain_context() {
  constexpr auto usual = c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView}) |
                         c10::autocast_dispatch_keyset;
  return (c10::impl::tls_local_dispatch_key_set().included_ - usual).empty() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::impl::torch_function_mode_enabled();
}

}  // namespace paramkit
