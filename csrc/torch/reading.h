// Rows of a file, read into rows of memory.
#pragma once

#include <cstdint>

namespace paramkit {

// Rows of `row_bytes` bytes: row k from `offset + k * file_stride` of the file to `address + k * memory_stride`.
struct FileRows {
  int64_t offset;
  int64_t file_stride;
  int64_t rows;
  int64_t row_bytes;
  char* address;
  int64_t memory_stride;
};

struct ReadOutcome {
  int64_t bytes;  // read, of all rows in their order; fewer than asked for: the file ended, or an error
  int error;      // errno, 0 if there was none
};

// Reads rows one after the other; those that follow each other in the file, many by one call. Touches nothing
// of Python: the GIL may be released.
ReadOutcome read_rows(int fd, const FileRows& asked);

}  // namespace paramkit
