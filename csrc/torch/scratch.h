#pragma once

#include <memory>

#include "torch/batch.h"

namespace paramkit {

// A Batch whose memory is kept between calls, one a thread. A call inside a call (a subclass's copy_
// that copies) gets one of its own.
class Scratch {
 public:
  Scratch() : own_(busy() ? std::make_unique<Batch>() : nullptr), batch_(own_ ? own_.get() : &shared()) {
    if (!own_) busy() = true;
  }
  ~Scratch() {
    batch_->clear();
    if (!own_) busy() = false;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Batch* operator->() const { return batch_; }
  Batch& operator*() const { return *batch_; }

 private:
  static bool& busy() {
    static thread_local bool value = false;
    return value;
  }
  static Batch& shared() {
    // Busy for ever once it is gone: what still copies while its thread ends gets a Batch of its own.
    struct Kept {
      Batch batch;
      ~Kept() { busy() = true; }
    };
    static thread_local Kept kept;
    return kept.batch;
  }

  std::unique_ptr<Batch> own_;
  Batch* batch_;
};

}  // namespace paramkit
