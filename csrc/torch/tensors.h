// What this library may know about a torch tensor: whether the kernels may touch its memory directly,
// and what torch itself would say of a write into it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/COWDeleter.h>
#include <torch/csrc/autograd/variable.h>

#include <atomic>
#include <cstring>

#include "core/task.h"

namespace paramkit {

// False for a tensor with a shape whose storage was resized to 0, as FSDP does, whatever its offset.
inline bool has_memory(const at::TensorImpl& impl) {
  return impl.unsafe_storage().unsafeGetStorageImpl()->data() != nullptr || impl.numel() == 0;
}

// Fetches what access() and data() look at, for lists that no cache holds: of 31,337 tensors looking at
// one was half a dozen misses in a row.
inline void prefetch(const at::TensorImpl* impl) {
  const char* bytes = reinterpret_cast<const char*>(impl);
  for (size_t line = 0; line < sizeof(at::TensorImpl); line += 64) __builtin_prefetch(bytes + line);
}
inline void prefetch(const at::StorageImpl* storage) {
  const char* bytes = reinterpret_cast<const char*>(storage);
  for (size_t line = 0; line < sizeof(at::StorageImpl); line += 64) __builtin_prefetch(bytes + line);
}

// It is a pointer to the counter; should it become something else, something else is fetched.
inline void prefetch(const c10::VariableVersion& version) {
  const void* counter = nullptr;
  std::memcpy(&counter, &version, sizeof(counter));
  __builtin_prefetch(counter, 1);
}

// How the kernels may treat a tensor.
enum class Access : uint8_t {
  Plain,      // a dense strided CPU tensor: its memory may be read and written
  Inference,  // the same, made in inference mode: no version counter
  Native,     // anything else: only torch knows how
};

// Whether the storage's memory is shared until somebody writes: what frees it tells.
inline bool copy_on_write(const at::TensorImpl& impl) {
  return impl.unsafe_storage().unsafeGetStorageImpl()->data_ptr().get_deleter() == &c10::impl::cow::cow_deleter;
}

inline Access access(const at::TensorImpl& impl) {
  constexpr auto normal =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU});
  constexpr auto inference = c10::DispatchKeySet(c10::DispatchKey::CPU);
  const auto keys = impl.key_set() - c10::autocast_dispatch_keyset;  // every CPU tensor carries those
  // Conjugate, negative, quantized, nested, functorch and subclass tensors all carry another key.
  if (keys != normal && keys != inference) return Access::Native;
  if (!impl.unsafe_storage() || impl.dim() > kMaxRank) return Access::Native;
  if (copy_on_write(impl)) return Access::Native;
  return keys == normal ? Access::Plain : Access::Inference;
}

// The same for a CUDA tensor: whether the device's memory may be read and written by kernels.
inline Access cuda_access(const at::TensorImpl& impl) {
  constexpr auto normal =
      c10::DispatchKeySet({c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCUDA});
  constexpr auto inference = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  const auto keys = impl.key_set() - c10::autocast_dispatch_keyset;
  if (keys != normal && keys != inference) return Access::Native;
  if (!impl.unsafe_storage() || impl.dim() > kMaxRank || copy_on_write(impl)) return Access::Native;
  return keys == normal ? Access::Plain : Access::Inference;
}

// The first element. Does not ask whether the storage is initialised: an empty tensor gives nullptr.
C10_ALWAYS_INLINE char* data(const at::TensorImpl& impl) {
  auto* base = static_cast<char*>(const_cast<void*>(impl.unsafe_storage().unsafeGetStorageImpl()->data()));
  return base + impl.storage_offset() * static_cast<int64_t>(impl.itemsize());
}

// [begin, end) of the bytes that a tensor's elements lie in. Strides are never negative in torch.
struct Range {
  const char* begin;
  const char* end;
  bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
};
Range range(const at::TensorImpl& impl);

// How the kernels see a pair of dtypes: equal ones as bytes of their width. False if they cannot
// convert one to the other.
bool kernel_types(c10::ScalarType dst, c10::ScalarType src, Type& to, Type& from);

// Asks torch what the kernels have to do alike, once, at import.
void adopt_numerics();

// Whether check_conversion() has found the pair to work before.
inline constexpr int kScalarTypes = static_cast<int>(c10::ScalarType::NumOptions);
extern std::atomic<bool> known_conversions[kScalarTypes][kScalarTypes];
inline bool conversion_known(c10::ScalarType dst, c10::ScalarType src) {
  return known_conversions[static_cast<int>(dst)][static_cast<int>(src)].load(std::memory_order_relaxed);
}

// Throws what `torch.empty(1, dtype=dst).copy_(torch.empty(1, dtype=src))` throws, if it does.
void check_conversion(c10::ScalarType dst, c10::ScalarType src);

// Writes the bytes of `value` as an element of `type`; throws what Tensor.fill_ throws for a tensor of
// `numel` elements (torch converts numbers for one element by another way than for many, and for
// float8 and complex32 their limits differ).
void scalar_bytes(const c10::Scalar& value, c10::ScalarType type, int64_t numel, char* bytes);

// Whether a write to or from this tensor concerns autograd: with grad mode on it requires grad, or it
// carries a forward-mode tangent.
inline bool on_autograd(const at::TensorImpl& impl, bool grad_mode) {
  // Most tensors carry no autograd metadata at all.
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(impl.autograd_meta());
  if (meta == nullptr) return false;
  return (grad_mode && meta->requires_grad()) || (meta->fw_grad_ != nullptr && !meta->fw_grad_->empty());
}

// Whether the shape of a tensor is what it says, and may be asked for.
bool has_shape(const at::Tensor& tensor);

// Whether autograd would record `dst.copy_(src)` (src may be null: a fill) or carry a forward-mode
// tangent through it. Throws, as torch does, where it may not be written in place.
bool needs_autograd(const at::Tensor& dst, const at::TensorImpl* src);

// True while the current thread runs plain eager code: no torch function or dispatch mode, no functorch
// transform, nothing that a raw write would hide from.
bool plain_context();

}  // namespace paramkit
