// Memory that calls in other threads may not touch meanwhile. The GIL keeps short calls apart. Long ones give it
// up, so each says what memory it is at, and waits for those before it that would make a mix.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "torch/tensors.h"

namespace paramkit {

// The memory of two lists of tensors, each sorted and merged.
struct Extent {
  std::vector<Range> dsts, srcs;
};

// The memory that tensors lie in, sorted and merged; ranges that are given need no order.
std::vector<Range> merged(std::vector<Range> ranges);
std::vector<Range> ranges_of(const std::vector<at::Tensor>& tensors);

// What has an extent. It is asked for only where another call is at work, and by any thread, the GIL held or not,
// but by one at a time.
class Claimant {
 public:
  virtual const Extent& extent() const = 0;

 protected:
  Claimant() = default;
  Claimant(const Claimant&) = default;
  Claimant(Claimant&&) = default;
  Claimant& operator=(const Claimant&) = default;
  Claimant& operator=(Claimant&&) = default;
  ~Claimant() = default;
};

// What is done with the two lists.
enum class Doing : uint8_t { Write, Compare, Exchange };

// Held for the length of a call. Of calls that would make a mix, the later one waits, without the GIL. Calls of
// one thread inside each other never wait for each other: a step of a long write, or what a callback does.
class Claim {
 public:
  // `long_call`: the GIL may be given up before it is over. A short call claims nothing as long as no other call is
  // at work. Needs the GIL. Throws PlanError where this thread holds another claim and would have to wait, since the
  // other one may wait for it; and what a signal handler raises.
  Claim(bool long_call, const Claimant& claimant, Doing doing = Doing::Write) : claimant_(claimant), doing_(doing) {
    if (long_call || others()) take();
  }
  ~Claim() {
    if (taken_) release();
  }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;

  // Whether it had to wait: then what was looked at before may have changed.
  bool waited() const { return waited_; }

  bool of(uintptr_t thread) const { return thread_ == thread; }

  // Whether any call is at work.
  static bool others();

 private:
  bool blocked(bool holding) const;
  void take();
  void wait();
  void release();

  const Claimant& claimant_;
  Doing doing_;
  bool taken_ = false, waited_ = false;
  bool active_ = false;  // no longer waiting
  uintptr_t thread_ = 0;
};

// Throws PlanError.
[[noreturn]] void raise_plan_error(const char* text);

// Keeps what is told to the other threads sound in a process that is forked meanwhile.
void prepare_claims();

// For tests that show what happens without: whether calls wait. Returns what it was.
bool set_claims(bool wanted);

}  // namespace paramkit
