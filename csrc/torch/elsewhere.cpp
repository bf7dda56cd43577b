#include "torch/elsewhere.h"

#include "cuda/pack.h"

namespace paramkit {

Elsewhere::Elsewhere(int dst_home, int src_home) : dst_home_(dst_home), src_home_(src_home) {
  if (dst_home != src_home) transfer_.emplace(where(), dst_home != devices::kHost);
}

bool Elsewhere::add(char* dst, const char* src, Type to, Type from, const Dim* dims, int rank, bool number) {
  // A number is the host's, and in a transfer one side is: that one need not be aligned.
  const void* kernel_dst = dst_home_ == devices::kHost ? nullptr : dst;
  const void* kernel_src = src_home_ == devices::kHost || number ? nullptr : src;
  // Part of a transfer may be a fill.
  const bool fills = transfer_ || cuda::one_element(dims, rank);
  if (!cuda::takes(kernel_dst, kernel_src, to, from, fills)) return false;
  if (transfer_) return transfer_->add(dst, src, to, from, dims, rank);
  const size_t before = program_.tasks.size();
  if (!program_.add(dst, src, to, from, dims, rank)) return false;
  if (number && program_.tasks.size() > before) program_.make_number();
  return true;
}

void Elsewhere::check() const {
  if (transfer_) transfer_->check();
}

void Elsewhere::run(size_t first, size_t last, bool non_blocking) const {
  if (transfer_) return transfer_->run(first, last, non_blocking);
  devices::run(program_, first, last, where(), false);
}

void Elsewhere::make_resident() {
  if (!transfer_) resident_.emplace(program_, where());
}

}  // namespace paramkit
