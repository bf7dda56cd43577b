// The torch-free core and the CPU kernels of every instruction set, against plain loops: normalize, classify,
// overlap, partition, run, equal. The entry is libFuzzer's; fuzz_driver.cpp calls it where there is none.
//
// PARAMKIT_FUZZ_CANARY plants a defect, to show that it would be found: "stray" (a byte beside what is written),
// "lost" (a byte that is not), "overlap" (writes that share memory said to be apart); and for the sanitizers "heap"
// and "shift".
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/overlap.h"
#include "core/partition.h"
#include "cpu/capability.h"
#include "cpu/equal.h"
#include "fuzz_naive.h"

namespace {

using namespace paramkit;
using namespace paramkit::fuzz;

bool planted(const char* defect) {
  static const char* canary = std::getenv("PARAMKIT_FUZZ_CANARY");
  return canary != nullptr && std::strcmp(canary, defect) == 0;
}

void describe(const List& list) {
  std::fprintf(stderr, "%d pieces%s, streams %d, phase %d, %ld bytes written into, %ld read\n", list.pieces,
               list.backwards ? " backwards" : "", list.streams, list.phase, list.dst_bytes, list.src_bytes);
  for (const Write& write : list.writes) {
    std::fprintf(stderr, "  type %d <- %d, at %ld <- %s%ld:", static_cast<int>(write.to), static_cast<int>(write.from),
                 write.dst, write.inside ? "the same " : "", write.src);
    for (int i = 0; i < write.rank; ++i) {
      std::fprintf(stderr, " {%ld, %ld, %ld}", write.dims[i].size, write.dims[i].dst, write.dims[i].src);
    }
    std::fprintf(stderr, "\n");
  }
}

[[noreturn]] void fail(const List& list, const std::string& what) {
  std::fprintf(stderr, "fuzz_core: %s\n", what.c_str());
  describe(list);
  std::abort();
}

// Memory of exactly so many bytes, from the given phase of a cache line on: the sanitizer watches its end.
class Exact {
 public:
  Exact(int64_t bytes, int phase)
      : memory_(static_cast<char*>(std::malloc(static_cast<size_t>(bytes + 64 + phase)))), bytes_(bytes) {
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    begin_ = memory_ + (64 - address % 64) % 64 + phase;
    // What is left behind it is given back, so that the end is the end.
    const auto used = static_cast<size_t>(begin_ - memory_) + static_cast<size_t>(bytes);
    const size_t before = static_cast<size_t>(begin_ - memory_);
    char* moved = static_cast<char*>(std::realloc(memory_, std::max<size_t>(used, 1)));
    if (moved != nullptr) memory_ = moved, begin_ = moved + before;
  }
  ~Exact() { std::free(memory_); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;

  char* begin() const { return begin_; }
  int64_t bytes() const { return bytes_; }
  void set(const std::vector<char>& bytes) { std::copy(bytes.begin(), bytes.end(), begin_); }
  bool holds(const std::vector<char>& bytes) const {
    return bytes.empty() || std::memcmp(begin_, bytes.data(), bytes.size()) == 0;
  }

 private:
  char* memory_;
  char* begin_;
  int64_t bytes_;
};

std::vector<char> noise(uint64_t seed, int64_t bytes) {
  std::vector<char> result(static_cast<size_t>(bytes));
  uint64_t state = seed * 0x9e3779b97f4a7c15ULL + 1;
  for (char& byte : result) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    byte = static_cast<char>(state >> 32);
  }
  return result;
}

// The program of a list, without the writes that the core leaves to torch, which the list loses too.
Program program_of(List& list, const Exact& dst, const Exact& src) {
  Program program;
  std::vector<Write> kept;
  int64_t bytes = 0;
  for (const Write& write : list.writes) {
    const char* source = (write.inside ? dst.begin() : src.begin()) + write.src;
    const size_t before = program.tasks.size();
    const bool twice = repeats(write);
    const bool added = program.add(dst.begin() + write.dst, source, write.to, write.from, write.dims, write.rank);
    if (added && twice) fail(list, "a write that repeats its destination was taken");
    if (!added && write.nested) fail(list, "a plain write was refused");
    if (!added) continue;
    int64_t elements = 1;
    for (int i = 0; i < write.rank; ++i) elements *= write.dims[i].size;
    if ((program.tasks.size() > before) != (elements > 0)) fail(list, "an empty write has a task, or another has none");
    if (elements == 0) continue;
    bytes += elements * width_of(write.to);
    const Task& task = program.tasks.back();
    int64_t in_task = task.run;
    for (int i = 0; i < task.rank; ++i) in_task *= program.dims[task.dims + static_cast<size_t>(i)].size;
    if (in_task != elements * width_of(write.to)) fail(list, "a task of another size than its write");
    if (task.units < 1) fail(list, "a task without units");
    kept.push_back(write);
  }
  if (program.bytes != bytes) fail(list, "the bytes of the program are not those of its writes");
  list.writes.swap(kept);
  return program;
}

std::vector<Cut> cut(const List& list, const Program& program) {
  std::vector<Cut> cuts;
  partition(program, 0, program.tasks.size(), list.pieces, cuts);
  if (cuts.size() != static_cast<size_t>(list.pieces) + 1) fail(list, "another number of pieces");
  if (cuts.front().task != 0 || cuts.front().unit != 0 || cuts.back().task != program.tasks.size()) {
    fail(list, "the pieces are not all of it");
  }
  for (size_t i = 1; i < cuts.size(); ++i) {
    const Cut &a = cuts[i - 1], &b = cuts[i];
    if (b.task < a.task || (b.task == a.task && b.unit < a.unit)) fail(list, "pieces out of order");
  }
  return cuts;
}

void compare(const List& list, const Memory& want, const Exact& dst, const std::string& who) {
  if (dst.holds(want.bytes)) return;
  for (size_t i = 0; i < want.bytes.size(); ++i) {
    if (want.loose[i] != 0 || want.bytes[i] == dst.begin()[i]) continue;
    fail(list, who + ": byte " + std::to_string(i) + " is " + std::to_string(dst.begin()[i] & 255) + ", not " +
                   std::to_string(want.bytes[i] & 255));
  }
}

void plant(const List& list, const Exact& dst) {
  const Write& last = list.writes.back();
  if (planted("stray")) dst.begin()[last.dst + last.dst_span] ^= 1;
  if (planted("lost")) dst.begin()[last.dst] ^= 1;
  if (planted("heap")) dst.begin()[dst.bytes()] = 0;
  if (planted("shift")) {
    volatile int by = 40;
    volatile int one = 1;
    one = one << by;
  }
}

void run_pieces(const List& list, const Program& program, const cpu::Kernels& kernels, std::vector<Cut> cuts) {
  const cpu::Stream stream{(list.streams & 1) != 0, (list.streams & 2) != 0, (list.streams & 4) != 0};
  const size_t n = cuts.size() - 1;
  for (size_t i = 0; i < n; ++i) {
    const size_t piece = list.backwards ? n - 1 - i : i;
    kernels.run(program, cuts[piece], cuts[piece + 1], stream);
  }
}

// Whether equal() says of every task what the bytes say, before and after one of them is changed.
void check_equal(const List& list, const Program& program, const Memory& want, const Exact& dst) {
  for (char same : cpu::equal(program, 1, nullptr)) {
    if (same == 0) fail(list, "equal() does not see that a write is done");
  }
  for (size_t w = 0; w < list.writes.size(); ++w) {
    const Write& write = list.writes[w];
    if (write.to != write.from) continue;  // what differs may be a NaN's
    const int64_t at = write.dst + list.seed % width_of(write.to);
    if (want.loose[static_cast<size_t>(at)] != 0) continue;
    dst.begin()[at] ^= 4;
    const std::vector<char> same = cpu::equal(program, 1, nullptr);
    dst.begin()[at] ^= 4;
    if (same[w] != 0) fail(list, "equal() does not see that a byte of write " + std::to_string(w) + " differs");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  List list = read_list(data, size);
  Exact dst(list.dst_bytes, list.phase), src(list.src_bytes, (list.phase * 7 + 3) % 64);
  const std::vector<char> before = noise(list.seed, list.dst_bytes), outside = noise(list.seed + 1, list.src_bytes);
  const Program program = program_of(list, dst, src);
  Memory want{before, std::vector<char>(before.size())};
  for (const Write& write : list.writes) write_naively(write, want, outside);

  bool shared = share_memory(program, 0, program.tasks.size());
  if (planted("overlap")) shared = false;
  if (!shared && share_bytes(list)) fail(list, "writes that share memory were said to be apart");
  if (shared && stretches_apart(list)) fail(list, "writes far apart were said to share memory");
  if (program.tasks.empty()) return 0;
  const std::vector<Cut> cuts = cut(list, program);
  src.set(outside);
  for (const cpu::Kernels* kernels : cpu::available()) {
    dst.set(before);
    run_pieces(list, program, *kernels, {{0, 0}, {program.tasks.size(), 0}});
    plant(list, dst);
    compare(list, want, dst, kernels->name);
    if (shared) continue;
    dst.set(before);
    run_pieces(list, program, *kernels, cuts);
    compare(list, want, dst, std::string(kernels->name) + " in pieces");
  }
  if (!src.holds(outside)) fail(list, "a source was written");
  if (!shared) check_equal(list, program, want, dst);
  return 0;
}
