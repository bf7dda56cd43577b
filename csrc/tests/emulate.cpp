// The CUDA library without CUDA: the interface of cuda/library.h, the kernels of cuda/kernels.cuh compiled for
// the host. "Device memory" is ordinary memory, streams mean nothing, every launch is over when it returns.
//
// Built and loaded by the tests; UBSan's alignment check (or -fsanitize=alignment alone) sees what a GPU would
// not forgive.
#include <ucontext.h>

#include <memory>
#include <vector>

#include "shim.h"
//
#include "cuda/kernels.cuh"
#include "cuda/library.h"

namespace paramkit::shim {

namespace {

// The threads of one block. Each runs until it waits; the next round begins when all have.
class Block {
 public:
  Block() : stacks_(new char[cuda::kThreads * kStack]), contexts_(cuda::kThreads) {}

  void run(const char* packet, uint32_t block, bool backwards) {
    packet_ = packet;
    block_ = block;
    for (uint32_t t = 0; t < cuda::kThreads; ++t) prepare(contexts_[t], stacks_.get() + t * kStack);
    active() = this;
    // Threads that are done have ended in the same round as all others: a block that some threads leave
    // without a barrier that others wait at is an error.
    for (bool done = false; !done;) {
      uint32_t ended = 0;
      for (uint32_t i = 0; i < cuda::kThreads; ++i) {
        thread_ = backwards ? cuda::kThreads - 1 - i : i;
        ended_ = false;
        swapcontext(&scheduler_, &contexts_[thread_]);
        ended += ended_ ? 1 : 0;
      }
      if (ended != 0 && ended != cuda::kThreads) {
        std::fprintf(stderr, "emulate: %u of %u threads did not reach a barrier\n", ended, cuda::kThreads);
        std::abort();
      }
      done = ended != 0;
    }
    active() = nullptr;
  }

  void wait() { swapcontext(&contexts_[thread_], &scheduler_); }

  static Block*& active() {
    static thread_local Block* block = nullptr;
    return block;
  }

 private:
  void prepare(ucontext_t& context, char* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = &scheduler_;
    makecontext(&context, &Block::enter, 0);
  }

  static void enter() {
    Block& self = *active();
    const uint32_t thread = self.thread_;
    cuda::run_block(self.packet_, self.block_, thread, self.shared_);
    self.ended_ = true;
  }

  static constexpr size_t kStack = 64 << 10;
  std::unique_ptr<char[]> stacks_;
  std::vector<ucontext_t> contexts_;
  ucontext_t scheduler_;
  const char* packet_ = nullptr;
  uint32_t block_ = 0, thread_ = 0;
  bool ended_ = false;
  alignas(16) char shared_[cuda::kSharedBytes];
};

}  // namespace

void meet() {
  if (Block::active() == nullptr) {
    std::fprintf(stderr, "emulate: a barrier in a block that has none\n");
    std::abort();
  }
  Block::active()->wait();
}

}  // namespace paramkit::shim

namespace {

using namespace paramkit;

// Only tiles meet at barriers: all other blocks do without stacks of their own. Every second launch goes
// backwards, so that what depends on the order of blocks or threads differs.
void run(const char* packet, uint64_t blocks, bool backwards) {
  static thread_local std::unique_ptr<shim::Block> fibers;
  for (uint64_t i = 0; i < blocks; ++i) {
    const auto block = static_cast<uint32_t>(backwards ? blocks - 1 - i : i);
    if (cuda::find_section(packet, block).kind == cuda::Kind::Tiles) {
      if (!fibers) fibers = std::make_unique<shim::Block>();
      fibers->run(packet, block, backwards);
      continue;
    }
    for (uint32_t t = 0; t < cuda::kThreads; ++t) {
      cuda::run_block(packet, block, backwards ? cuda::kThreads - 1 - t : t, nullptr);
    }
  }
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int32_t paramkit_interface() { return PARAMKIT_CUDA_INTERFACE; }

__attribute__((visibility("default"))) int32_t paramkit_describe(int32_t, paramkit_device* result) {
  // Small, so that ordinary lists do not fit into the arguments.
  *result = {4, 90, 1024};
  return 0;
}

__attribute__((visibility("default"))) int32_t paramkit_launch_packet(const paramkit_launch* launch) {
  static thread_local bool backwards = false;
  backwards = !backwards;
  run(static_cast<const char*>(launch->packet), launch->blocks, backwards);
  return 0;
}

__attribute__((visibility("default"))) int32_t paramkit_capturing(void*, int32_t* result) {
  *result = 0;
  return 0;
}

__attribute__((visibility("default"))) int32_t paramkit_keep(void*, void (*release)(void*), void* object) {
  release(object);
  return 0;
}

__attribute__((visibility("default"))) const char* paramkit_error(int32_t) { return "no error"; }

}  // extern "C"
