#include "torch/tensors.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"

namespace paramkit {

Range range(const at::TensorImpl& impl) {
  const char* begin = data(impl);
  if (impl.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < impl.dim(); ++i) last += (impl.sizes()[i] - 1) * impl.strides()[i];
  return {begin, begin + (last + 1) * static_cast<int64_t>(impl.itemsize())};
}

// Found by trying, once: torch's own answer, whatever its version.
std::atomic<bool> known_conversions[kScalarTypes][kScalarTypes];

void check_conversion(c10::ScalarType dst, c10::ScalarType src) {
  if (conversion_known(dst, src)) return;
  c10::InferenceMode guard;  // one element, invisible to autograd
  at::empty({1}, at::TensorOptions().dtype(dst)).copy_(at::empty({1}, at::TensorOptions().dtype(src)));
  known_conversions[static_cast<int>(dst)][static_cast<int>(src)] = true;
}

namespace {

// Bytes1 where the kernels only move.
Type convertible(c10::ScalarType type) {
  switch (type) {
    case c10::ScalarType::Double: return Type::Float64;
    case c10::ScalarType::Float: return Type::Float32;
    case c10::ScalarType::Half: return Type::Float16;
    case c10::ScalarType::BFloat16: return Type::BFloat16;
    case c10::ScalarType::Float8_e4m3fn: return Type::Float8E4M3FN;
    case c10::ScalarType::Float8_e4m3fnuz: return Type::Float8E4M3FNUZ;
    case c10::ScalarType::Float8_e5m2: return Type::Float8E5M2;
    case c10::ScalarType::Float8_e5m2fnuz: return Type::Float8E5M2FNUZ;
    case c10::ScalarType::Float8_e8m0fnu: return Type::Float8E8M0FNU;
    case c10::ScalarType::Char: return Type::Int8;
    case c10::ScalarType::Short: return Type::Int16;
    case c10::ScalarType::Int: return Type::Int32;
    case c10::ScalarType::Long: return Type::Int64;
    case c10::ScalarType::Byte: return Type::UInt8;
    case c10::ScalarType::UInt16: return Type::UInt16;
    case c10::ScalarType::UInt32: return Type::UInt32;
    case c10::ScalarType::UInt64: return Type::UInt64;
    case c10::ScalarType::Bool: return Type::Bool;
    default: return Type::Bytes1;
  }
}

}  // namespace

bool kernel_types(c10::ScalarType dst, c10::ScalarType src, Type& to, Type& from) {
  if (dst == src) {
    to = from = bytes_of_width(static_cast<int64_t>(c10::elementSize(dst)));
    return true;
  }
  to = convertible(dst), from = convertible(src);
  return to != Type::Bytes1 && from != Type::Bytes1;
}

void adopt_numerics() {
  c10::InferenceMode guard;
  const auto large = at::empty({1}, at::TensorOptions().dtype(c10::ScalarType::Float)).fill_(480.0);
  const auto narrow = at::empty({1}, at::TensorOptions().dtype(c10::ScalarType::Float8_e4m3fn)).copy_(large);
  cpu::e4m3fn_saturates = *static_cast<const uint8_t*>(narrow.const_data_ptr()) == 0x7e;
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
  // As torch's kernel for many elements does; float8_e8m0fnu has a way of its own there.
  if (numel != 1) {
    switch (type) {
      case c10::ScalarType::Half: return put(value.to<c10::Half>(), bytes);
      case c10::ScalarType::BFloat16: return put(value.to<c10::BFloat16>(), bytes);
      case c10::ScalarType::Bool: return put(value.to<bool>(), bytes);
      case c10::ScalarType::Byte: return put(value.to<uint8_t>(), bytes);
      case c10::ScalarType::Char: return put(value.to<int8_t>(), bytes);
      case c10::ScalarType::Short: return put(value.to<int16_t>(), bytes);
      case c10::ScalarType::UInt16: return put(value.to<uint16_t>(), bytes);
      case c10::ScalarType::UInt32: return put(value.to<uint32_t>(), bytes);
      case c10::ScalarType::UInt64: return put(value.to<uint64_t>(), bytes);
      case c10::ScalarType::Float8_e4m3fn: return put(value.to<c10::Float8_e4m3fn>(), bytes);
      case c10::ScalarType::Float8_e4m3fnuz: return put(value.to<c10::Float8_e4m3fnuz>(), bytes);
      case c10::ScalarType::Float8_e5m2: return put(value.to<c10::Float8_e5m2>(), bytes);
      case c10::ScalarType::Float8_e5m2fnuz: return put(value.to<c10::Float8_e5m2fnuz>(), bytes);
      case c10::ScalarType::ComplexFloat: return put(value.to<c10::complex<float>>(), bytes);
      case c10::ScalarType::ComplexDouble: return put(value.to<c10::complex<double>>(), bytes);
      default: break;
    }
  }
  c10::InferenceMode guard;
  const auto few = at::empty({std::min<int64_t>(numel, 2)}, at::TensorOptions().dtype(type)).fill_(value);
  if (numel > 0) std::memcpy(bytes, few.const_data_ptr(), few.element_size());
}

bool has_shape(const at::Tensor& tensor) {
  constexpr auto own_shapes = c10::DispatchKeySet(c10::DispatchKey::NestedTensor) | c10::functorch_transforms_ks;
  return !tensor.key_set().has_any(own_shapes) && !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
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
