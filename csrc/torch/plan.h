// The compiled part of a plan: the writes as tasks, and all that must still be true when they run
// again. See paramkit/plan.py for the part with names.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

#include "core/task.h"
#include "torch/claims.h"
#include "torch/elsewhere.h"
#include "torch/tensors.h"

namespace paramkit {

class Plan : public Claimant {
 public:
  // Measures what plans compare with, at import: it runs Python code, which no guard of a static
  // variable may wait for.
  static void prepare();

  // One write: views of dsts[dst] and srcs[src] of the same sizes, strides and offsets in elements,
  // relative to the tensor's first element.
  struct Write {
    int64_t dst, src;
    std::vector<int64_t> sizes, dst_strides;
    int64_t dst_offset;
    std::vector<int64_t> src_strides;
    int64_t src_offset;
  };

  // What the plan was resolved through: `table[key] is value` must still hold.
  struct Slot {
    pybind11::object table, key, value;
  };

  // Reference counts of a tensor, on the C++ side and of its Python object.
  struct Counts {
    size_t tensor;
    Py_ssize_t object;
  };

  // follow_autograd: every write covers a whole destination, and is judged as Tensor.copy_ would be.
  // ordered: writes may touch the same element; the later one wins.
  Plan(std::vector<at::Tensor> dsts, std::vector<at::Tensor> srcs, std::vector<Write> writes, std::vector<Slot> slots,
       bool follow_autograd, bool ordered);

  std::vector<std::string> families() const;

  // Indices of slots that hold something else now; of destinations and of sources that moved, changed
  // their layout, or that only this plan still keeps alive.
  std::vector<int64_t> replaced() const;
  std::pair<std::vector<int64_t>, std::vector<int64_t>> moved() const;

  const std::vector<at::Tensor>& destinations() const { return dsts_; }
  const std::vector<at::Tensor>& sources() const { return srcs_; }
  const std::vector<Write>& writes() const { return writes_; }

  // For the garbage collector: a module that is part of the model may hold the plan.
  const std::vector<Slot>& slots() const { return slots_; }
  void forget_slots() { const auto forgotten = std::exchange(slots_, {}); }

  // Takes new sources by name, one for each of sources(). True, and nothing taken, if one is missing,
  // is no plain tensor, has another shape, dtype, device or strides, or may share memory with a
  // destination.
  bool rebind(const pybind11::dict& tensors, const pybind11::list& names);

  // Writes. False, and nothing written, if replaced() or moved() has something to say.
  // progress(done_bytes, total_bytes) is called now and then.
  bool run(const pybind11::object& progress);

  // Swaps both sides of every write, bit for bit. The caller knows that no memory is part of two sides.
  // False, and nothing written, as run(). Throws, and nothing written, where a write converts or repeats.
  bool exchange();

  // Swaps again, also where a destination was replaced in its model. Indices of the writes that were left,
  // because the memory of one side is not what it was.
  std::vector<int64_t> exchange_back();

  // How many exchanges were done: told apart from their calls, behind which an interrupt may come.
  int64_t exchanges() const { return exchanges_; }
  // How many runs came to their first write: what fails before has written nothing.
  int64_t runs() const { return runs_; }

  // The memory of all destinations and of all sources.
  const Extent& extent() const override;

  // Indices of the writes whose destination does not hold what the source says.
  std::vector<int64_t> verify() const;

 private:
  // What tensors that are alike have in common. Most lists have a few kinds, which stay in the L1 cache
  // while a thousand tensors are compared with them.
  struct Kind {
    c10::DispatchKeySet keys;  // among them the conjugate and the negative bit
    caffe2::TypeMeta dtype;
    uint32_t rank;
    size_t layout;  // sizes, then strides, in layouts_
  };

  // A tensor as it was when the plan was made.
  struct Snapshot {
    at::TensorImpl* impl;
    at::StorageImpl* storage;  // null if it is not strided
    const char* data;          // the first element
    size_t bytes;              // of the storage
    uint32_t kind;
    bool copy_on_write;
  };

  // Who else may hold a destination of a list: its Python object, and a view's base with its own.
  struct Owner {
    PyObject* object;
    at::TensorImpl* base;
    PyObject* base_object;
  };

  // Which write each task elsewhere is.
  struct Other : Elsewhere {
    using Elsewhere::Elsewhere;
    std::vector<uint32_t> write_of;
  };

  class Kinds;
  void set_memory(Snapshot& snapshot, const at::Tensor& tensor) const;
  bool same_layout(const Snapshot& was, const at::TensorImpl& impl) const;
  bool intact(const Snapshot& was) const;
  template <class Also>
  bool intact(const std::vector<Snapshot>& all, bool& recorded, Also also) const;
  bool slot_holds(const Slot& slot) const;
  bool orphan(size_t dst) const;
  bool intact(bool& recorded) const;
  std::vector<Range> planned(const std::vector<Snapshot>& all) const;
  const std::vector<Range>& extent_dsts() const;
  void compile();
  void compile(size_t write);
  at::Tensor view(const at::Tensor& tensor, const Write& write, bool dst) const;
  void copy_native(size_t write) const;
  void swap(const std::vector<char>& chosen);
  int64_t bytes_of(size_t write) const;
  void run_in_pieces(const pybind11::object& progress);

  std::vector<at::Tensor> dsts_, srcs_;
  std::vector<Write> writes_;
  std::vector<Slot> slots_;
  bool follow_autograd_, ordered_;
  int64_t exchanges_ = 0, runs_ = 0;
  Counts orphan_counts_[2];  // of a tensor, and of the base of a view
  mutable Extent extent_;
  mutable bool dsts_known_ = false, srcs_known_ = false;  // of extent_

  std::vector<Snapshot> dst_snapshots_, src_snapshots_;
  std::vector<Owner> owners_;  // of the destinations, where autograd is followed
  std::vector<Kind> kinds_;
  std::vector<int64_t> layouts_;
  Program program_;
  std::vector<uint32_t> task_write_;  // the write of each task
  std::vector<uint32_t> native_;      // writes that torch's own copy_ does
  std::vector<Other> others_;
};

}  // namespace paramkit
