#include "torch/transfer.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <deque>

#include "core/normalize.h"
#include "torch/devices.h"
#include "torch/staging.h"
#include "torch/threads.h"

namespace paramkit {

namespace {

// Where pieces begin in a slot: whatever their elements, and cache lines, are aligned.
constexpr int64_t kAlign = 64;
int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// The device's side of a slot. One for a run: what is put into the stream uses it in turn.
at::Tensor device_side(const Ring::Hold& ring, int64_t total, int where) {
  return devices::device_memory(std::min(ring.slot_bytes(), total), where);
}

}  // namespace

bool Transfer::add(char* dst, const char* src, Type to, Type from, const Dim* loops, int rank) {
  const size_t before = writes_.tasks.size();
  if (!writes_.add(dst, src, to, from, loops, rank)) return false;
  if (writes_.tasks.size() == before) return true;  // a size is 0
  if (to == from) to = from = bytes_of_width(width_of(to));
  Dim dims[kMaxRank];
  int n = 0;
  for (int i = 0; i < rank; ++i) {
    if (loops[i].size != 1) dims[n++] = loops[i];
  }
  const auto host = [this](const Dim& d) { return to_device_ ? d.src : d.dst; };
  // The host's memory in its own order: the device permutes faster.
  sort_dims(dims, n, [&](const Dim& a, const Dim& b) { return host(a) > host(b); });
  const auto advancing = static_cast<int>(std::count_if(dims, dims + n, [&](const Dim& d) { return host(d) != 0; }));
  add_piece(dst, src, to, from, dims, n, advancing);
  ends_.push_back(pieces_.size());
  return true;
}

void Transfer::add_piece(char* dst, const char* src, Type to, Type from, Dim* dims, int rank, int advancing) {
  // Where both are as wide the host converts, as in torch's own blocking copy.
  const bool keeps = width_of(to) == width_of(from) ? !to_device_ : width_of(from) < width_of(to);
  const Type between = keeps ? from : to;
  int64_t bytes = width_of(between);
  for (int i = 0; i < advancing; ++i) bytes *= dims[i].size;
  const int64_t most = slot_bytes_wanted();
  if (bytes > most) {
    // The outermost loop is cut into as many parts as it takes; what is left of one turn is cut further.
    const Dim outer = dims[0];
    const int64_t turn = bytes / outer.size, turns = std::max<int64_t>(most / turn, 1);
    for (int64_t at = 0; at < outer.size; at += turns) {
      Dim part[kMaxRank];
      std::copy(dims, dims + rank, part);
      part[0].size = std::min(turns, outer.size - at);
      char* d = dst + at * outer.dst;
      const char* s = src + at * outer.src;
      if (part[0].size == 1) {
        add_piece(d, s, to, from, part + 1, rank - 1, advancing - 1);
      } else {
        add_piece(d, s, to, from, part, rank, advancing);
      }
    }
    return;
  }
  Piece piece{dst,
              src,
              to,
              from,
              between,
              static_cast<uint32_t>(dims_.size()),
              static_cast<uint8_t>(rank),
              static_cast<uint8_t>(advancing),
              bytes};
  dims_.insert(dims_.end(), dims, dims + rank);
  pieces_.push_back(piece);
  largest_ = std::max(largest_, bytes);
}

// A slot holds a piece densely, in the order of its loops, but for those in which the host's memory repeats.
void Transfer::to_slot(const Piece& piece, char* slot, Program& program) const {
  Dim dims[kMaxRank];
  int64_t step = width_of(piece.between);
  for (int i = piece.advancing; i-- > 0;) {
    const Dim& dim = dims_[piece.dims + static_cast<uint32_t>(i)];
    dims[i] = {dim.size, step, dim.src};
    step *= dim.size;
  }
  program.add(slot, piece.src, piece.between, piece.from, dims, piece.advancing);
}

void Transfer::from_slot(const Piece& piece, const char* slot, Program& program) const {
  Dim dims[kMaxRank];
  int64_t step = width_of(piece.between);
  for (int i = piece.rank; i-- > 0;) {
    const Dim& dim = dims_[piece.dims + static_cast<uint32_t>(i)];
    dims[i] = {dim.size, dim.dst, i < piece.advancing ? step : 0};
    if (i < piece.advancing) step *= dim.size;
  }
  program.add(piece.dst, slot, piece.to, piece.between, dims, piece.rank);
}

void Transfer::check() const {
  if (pieces_.empty()) return;  // nothing was taken
  TORCH_CHECK(!devices::capturing(where_),
              "a copy between pageable host memory and a CUDA device cannot be captured in a graph: its host memory "
              "would be read once, not at every replay. Copy before the capture, or from pinned memory with torch");
  const ReleaseGil released(true);
  Ring::Hold ring(largest_, bytes_of(0, pieces_.size()));
  ring.reserve();
  // Given back, torch's allocator has it for the run.
  (void)device_side(ring, bytes_of(0, pieces_.size()), where_);
}

// In slots.
int64_t Transfer::bytes_of(size_t first, size_t last) const {
  int64_t bytes = 0;
  for (size_t i = first; i < last; ++i) bytes = aligned(bytes) + pieces_[i].bytes;
  return bytes;
}

void Transfer::run(size_t first, size_t last, bool non_blocking) const {
  const size_t begin = first == 0 ? 0 : ends_[first - 1], end = last == 0 ? 0 : ends_[last - 1];
  if (begin == end) return;
  // The slots may be another call's, which may need the GIL to be done with them.
  const ReleaseGil released(true);
  const c10::InferenceMode not_inference(false);
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto on_device = devices::guard(where_);
  to_device_ ? run_to_device(begin, end, non_blocking) : run_to_host(begin, end);
}

// Whether what is under way in the stream may still write a source: only pinned memory can be written so.
bool Transfer::may_be_written(size_t first, size_t last) const {
  return std::any_of(pieces_.begin() + static_cast<ptrdiff_t>(first), pieces_.begin() + static_cast<ptrdiff_t>(last),
                     [](const Piece& piece) { return at::globalContext().isPinnedPtr(piece.src); });
}

void Transfer::run_to_device(size_t first, size_t last, bool non_blocking) const {
  Ring::Hold ring(largest_, bytes_of(first, last));
  // The sources are read now, by the host. A call that blocks waits at its end anyway.
  if (!non_blocking || may_be_written(first, last)) {
    Mark before;
    before.set(where_);
    before.wait();
  }
  const at::Tensor there = device_side(ring, bytes_of(first, last), where_);
  const auto* const arrived = static_cast<const char*>(there.const_data_ptr());
  Program gather, scatter;
  while (first < last) {
    char* const slot = ring.next();
    int64_t bytes = 0;
    size_t next = first;
    for (; next < last && aligned(bytes) + pieces_[next].bytes <= ring.slot_bytes(); ++next) {
      to_slot(pieces_[next], slot + aligned(bytes), gather);
      bytes = aligned(bytes) + pieces_[next].bytes;
    }
    run_on_host(gather, 0, gather.tasks.size(), true);
    there.narrow(0, 0, bytes).copy_(ring.tensor(bytes), /*non_blocking=*/true);
    ring.used_by(where_);
    int64_t at = 0;
    for (size_t i = first; i < next; ++i) {
      from_slot(pieces_[i], arrived + aligned(at), scatter);
      at = aligned(at) + pieces_[i].bytes;
    }
    devices::run(scatter, 0, scatter.tasks.size(), where_, false);
    devices::count_staged(bytes);
    gather.clear();
    scatter.clear();
    first = next;
  }
  if (non_blocking) return;
  Mark all;
  all.set(where_);
  all.wait();
}

void Transfer::run_to_host(size_t first, size_t last) const {
  Ring::Hold ring(largest_, bytes_of(first, last));
  const at::Tensor here = device_side(ring, bytes_of(first, last), where_);
  auto* const gathered = static_cast<char*>(here.mutable_data_ptr());
  Program gather;
  // What was sent into each slot, and is to be scattered from it.
  struct Sent {
    int slot;
    Program scatter;
  };
  std::deque<Sent> under_way;
  const auto scatter_one = [&] {
    ring.wait(under_way.front().slot);
    const Program& scatter = under_way.front().scatter;
    run_on_host(scatter, 0, scatter.tasks.size(), false);
    under_way.pop_front();
  };
  while (first < last) {
    if (under_way.size() == Ring::kSlots) scatter_one();
    char* const slot = ring.next();
    int64_t bytes = 0;
    size_t next = first;
    Sent sent{ring.current(), {}};
    for (; next < last && aligned(bytes) + pieces_[next].bytes <= ring.slot_bytes(); ++next) {
      from_slot(pieces_[next], slot + aligned(bytes), sent.scatter);
      bytes = aligned(bytes) + pieces_[next].bytes;
    }
    int64_t at = 0;
    for (size_t i = first; i < next; ++i) {
      to_slot(pieces_[i], gathered + aligned(at), gather);
      at = aligned(at) + pieces_[i].bytes;
    }
    devices::run(gather, 0, gather.tasks.size(), where_, true);
    ring.tensor(bytes).copy_(here.narrow(0, 0, bytes), /*non_blocking=*/true);
    ring.used_by(where_);
    devices::count_staged(bytes);
    under_way.push_back(std::move(sent));
    gather.clear();
    first = next;
  }
  while (!under_way.empty()) scatter_one();
}

}  // namespace paramkit
