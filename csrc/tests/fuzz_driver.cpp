// Runs fuzz_core.cpp where there is no libFuzzer: seeded random inputs, and mutations of those that reached new
// code. The compiler's -fsanitize-coverage=trace-pc tells what was reached; this file is built without it.
//
//   fuzz_core [--seconds N] [--runs N] [--seed N] [FILE ...]
//
// Files are run once, to repeat a failure. A failing input is written to crash.bin in the working folder.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

constexpr size_t kCounters = 1 << 16;
uint8_t reached[kCounters];  // by the run under way
uint8_t ever[kCounters];
Input running;
uint64_t runs_done = 0, base_seed = 0;

void keep_failure() {
  if (std::FILE* file = std::fopen("crash.bin", "wb")) {
    std::fwrite(running.data(), 1, running.size(), file);
    std::fclose(file);
  }
  std::fprintf(stderr, "fuzz_core: seed %lu, run %lu; to repeat it: fuzz_core crash.bin\n", base_seed, runs_done);
}

void on_abort(int) {
  keep_failure();
  std::_Exit(77);
}

void run(const Input& input) {
  running = input;
  std::memset(reached, 0, sizeof(reached));
  LLVMFuzzerTestOneInput(input.data(), input.size());
  ++runs_done;
}

bool found_something() {
  bool found = false;
  for (size_t i = 0; i < kCounters; ++i) {
    if (reached[i] == 0 || ever[i] != 0) continue;
    ever[i] = 1;
    found = true;
  }
  return found;
}

class Inputs {
 public:
  explicit Inputs(uint64_t seed) : random_(seed) {}

  Input next() {
    if (corpus_.empty() || below(3) == 0) return fresh();
    Input input = corpus_[below(corpus_.size())];
    for (uint64_t n = 1 + below(6); n > 0; --n) mutate(input);
    return input;
  }
  void keep(const Input& input) { corpus_.push_back(input); }
  size_t kept() const { return corpus_.size(); }

 private:
  uint64_t below(uint64_t n) { return random_() % n; }

  Input fresh() {
    Input input(6 + below(below(4) == 0 ? 200 : 60));
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(random_());
    return input;
  }

  void mutate(Input& input) {
    const size_t at = below(input.size());
    switch (below(6)) {
      case 0: input[at] = static_cast<uint8_t>(random_()); break;
      case 1: input[at] ^= static_cast<uint8_t>(1U << below(8)); break;
      case 2: input[at] = static_cast<uint8_t>(input[at] + below(9) - 4); break;
      case 3: input.insert(input.begin() + static_cast<ptrdiff_t>(at), static_cast<uint8_t>(random_())); break;
      case 4:
        if (input.size() > 8) input.erase(input.begin() + static_cast<ptrdiff_t>(at));
        break;
      default: {  // the beginning of this one, the end of another
        const Input& other = corpus_[below(corpus_.size())];
        input.resize(at);
        input.insert(input.end(), other.begin() + static_cast<ptrdiff_t>(std::min(at, other.size())), other.end());
        if (input.empty()) input = other;
      }
    }
    if (input.size() > 400) input.resize(400);
  }

  std::mt19937_64 random_;
  std::vector<Input> corpus_;
};

Input read_file(const char* path) {
  Input input;
  std::FILE* file = std::fopen(path, "rb");
  if (file == nullptr) {
    std::perror(path);
    std::exit(2);
  }
  for (int c; (c = std::fgetc(file)) != EOF;) input.push_back(static_cast<uint8_t>(c));
  std::fclose(file);
  return input;
}

}  // namespace

// Freed memory is kept from being used again for a while: little of it, since clearing pages takes the time.
extern "C" const char* __asan_default_options() { return "quarantine_size_mb=4"; }

extern "C" void __sanitizer_cov_trace_pc() {
  const auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  reached[(pc ^ pc >> 16) % kCounters] = 1;
}

int main(int argc, char** argv) {
  std::signal(SIGABRT, on_abort);
  __sanitizer_set_death_callback(keep_failure);
  double seconds = 10;
  uint64_t most = UINT64_MAX;
  bool files = false;
  for (int i = 1; i < argc; ++i) {
    const auto is = [&](const char* name) { return std::strcmp(argv[i], name) == 0 && i + 1 < argc; };
    if (is("--seconds")) {
      seconds = std::atof(argv[++i]);
    } else if (is("--runs")) {
      most = std::strtoull(argv[++i], nullptr, 10);
    } else if (is("--seed")) {
      base_seed = std::strtoull(argv[++i], nullptr, 10);
    } else {
      files = true;
      run(read_file(argv[i]));
    }
  }
  if (files) return 0;
  Inputs inputs(base_seed);
  const auto start = std::chrono::steady_clock::now();
  while (runs_done < most &&
         std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    const Input input = inputs.next();
    run(input);
    if (found_something()) inputs.keep(input);
  }
  std::printf("%lu lists, %zu inputs kept, seed %lu\n", runs_done, inputs.kept(), base_seed);
  return 0;
}
