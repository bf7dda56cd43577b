// Faults on demand, by LD_PRELOAD: reads that come short, are interrupted or fail, and memory that there is none of.
// Nothing happens until one of the faulty_* functions arms it.
#include <dlfcn.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

// --- reads ---

enum : int { kShort = 1, kInterrupted = 2, kBroken = 4 };

std::atomic<int> mode{0};
std::atomic<uint64_t> state{1}, reads{0}, faults{0};
std::atomic<int64_t> until_broken{-1};

uint64_t next_number() {
  uint64_t x = state.load(), y = 0;
  do {
    y = x ^ (x << 13);
    y ^= y >> 7;
    y ^= y << 17;
  } while (!state.compare_exchange_weak(x, y));
  return y >> 16;
}

// Whether this read fails; otherwise `bytes` is what it may get at most.
bool fails(size_t& bytes) {
  ++reads;
  const int how = mode.load();
  if ((how & kBroken) != 0 && until_broken.fetch_sub(1) == 0) {
    ++faults;
    errno = EIO;
    return true;
  }
  if ((how & kInterrupted) != 0 && next_number() % 3 == 0) {
    ++faults;
    errno = EINTR;
    return true;
  }
  if ((how & kShort) != 0 && bytes > 1 && next_number() % 4 != 0) {
    ++faults;
    bytes = 1 + next_number() % (bytes - 1);
  }
  return false;
}

template <class Function>
Function next(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

ssize_t read_one(int fd, void* data, size_t bytes, off64_t offset) {
  static const auto real = next<ssize_t (*)(int, void*, size_t, off64_t)>("pread64");
  return mode.load() != 0 && fails(bytes) ? -1 : real(fd, data, bytes, offset);
}

ssize_t read_pieces(int fd, const iovec* pieces, int count, off64_t offset) {
  static const auto real = next<ssize_t (*)(int, const iovec*, int, off64_t)>("preadv64");
  if (mode.load() == 0) return real(fd, pieces, count, offset);
  size_t all = 0;
  for (int i = 0; i < count; ++i) all += pieces[i].iov_len;
  size_t bytes = all;
  if (fails(bytes)) return -1;
  // The first pieces that fit, or a part of the first one.
  int whole = 0;
  for (size_t sum = 0; whole < count && sum + pieces[whole].iov_len <= bytes; ++whole) sum += pieces[whole].iov_len;
  if (whole > 0) return real(fd, pieces, whole, offset);
  const iovec part = {pieces[0].iov_base, bytes};
  return real(fd, &part, 1, offset);
}

// --- memory ---

// Counts down at each allocation that qualifies; that which finds 0 fails.
std::atomic<int64_t> until_new{-1}, until_aligned{-1};
std::atomic<size_t> least_aligned{0};
std::atomic<uintptr_t> from{0}, to{0};
std::atomic<bool> failed{false};

bool falls(std::atomic<int64_t>& counter) {
  if (counter.load(std::memory_order_relaxed) < 0 || counter.fetch_sub(1) != 0) return false;
  failed = true;
  return true;
}

}  // namespace

extern "C" {

// Reads of all threads from now on; 0: none. `broken_at`: which one fails with EIO, if `how` has that.
void faulty_reads(int how, uint64_t seed, int64_t broken_at) {
  state = seed * 2 + 1;
  until_broken = broken_at;
  reads = faults = 0;
  mode = how;
}
uint64_t faulty_reads_seen() { return reads; }
uint64_t faulty_reads_hit() { return faults; }

// The n-th `new` that code in [begin, end) asks for fails, once; n < 0: none does.
void faulty_new(int64_t n, uintptr_t begin, uintptr_t end) {
  failed = false;
  from = begin;
  to = end;
  until_new = n;
}
int64_t faulty_new_left() { return until_new; }
// The n-th aligned allocation of at least so many bytes: those of torch's tensors on the CPU.
void faulty_aligned(int64_t n, size_t least) {
  failed = false;
  least_aligned = least;
  until_aligned = n;
}
bool faulty_failed() { return failed; }

ssize_t pread64(int fd, void* data, size_t bytes, off64_t offset) { return read_one(fd, data, bytes, offset); }
ssize_t pread(int fd, void* data, size_t bytes, off_t offset) { return read_one(fd, data, bytes, offset); }
ssize_t preadv64(int fd, const iovec* p, int n, off64_t offset) { return read_pieces(fd, p, n, offset); }
ssize_t preadv(int fd, const iovec* p, int n, off_t offset) { return read_pieces(fd, p, n, offset); }
ssize_t preadv64v2(int fd, const iovec* p, int n, off64_t offset, int) { return read_pieces(fd, p, n, offset); }
ssize_t preadv2(int fd, const iovec* p, int n, off_t offset, int) { return read_pieces(fd, p, n, offset); }

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  static const auto real = next<int (*)(void**, size_t, size_t)>("posix_memalign");
  if (bytes >= least_aligned && falls(until_aligned)) return ENOMEM;
  return real(memory, alignment, bytes);
}

}  // extern "C"

void* operator new(size_t bytes) {
  const auto caller = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  void* memory = caller >= from && caller < to && falls(until_new) ? nullptr : malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
