#include "torch/reading.h"

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>

namespace paramkit {

ReadOutcome read_rows(int fd, const FileRows& asked) {
  constexpr int64_t kMost = 64;  // rows in one call: of that many the call itself costs nothing beside them
  std::array<iovec, kMost> pieces;
  const int64_t total = asked.rows * asked.row_bytes;
  const int64_t at_once = asked.file_stride == asked.row_bytes ? kMost : 1;
  int64_t done = 0;
  while (done < total) {
    const int64_t row = done / asked.row_bytes;
    const int64_t within = done % asked.row_bytes;  // of a row that was read in part
    const int64_t count = std::min(at_once, asked.rows - row);
    for (int64_t k = 0; k < count; ++k) {
      pieces[static_cast<size_t>(k)] = {asked.address + (row + k) * asked.memory_stride,
                                        static_cast<size_t>(asked.row_bytes)};
    }
    pieces[0].iov_base = static_cast<char*>(pieces[0].iov_base) + within;
    pieces[0].iov_len -= static_cast<size_t>(within);
    const ssize_t got =
        preadv(fd, pieces.data(), static_cast<int>(count), asked.offset + row * asked.file_stride + within);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return {done, errno};
    if (got == 0) break;
    done += got;
  }
  return {done, 0};
}

}  // namespace paramkit
