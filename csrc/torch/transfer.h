// Writes between host and device memory: gathered on one side into a buffer of the narrower dtype, moved in
// one piece, scattered on the other side.
//
//     host to device    CPU threads gather -> pinned slot -> one copy -> a kernel casts and permutes
//     device to host    a kernel gathers -> one copy -> pinned slot -> CPU threads cast and scatter
//
// The slots are few, pinned, and used in turn: while one is on its way the next is filled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/task.h"

namespace paramkit {

class Transfer {
 public:
  // `to_device`: the destinations are on the device, the sources on the host; else the other way round.
  Transfer(int where, bool to_device) : where_(where), to_device_(to_device) {}

  int where() const { return where_; }
  bool to_device() const { return to_device_; }

  // Adds a write: `rank` loops, strides in bytes, as Program::add. False, and nothing added, if two steps of
  // the loops may reach one element of the destination.
  bool add(char* dst, const char* src, Type to, Type from, const Dim* dims, int rank);

  // How many were added, and what they write and read, for share_memory().
  size_t size() const { return ends_.size(); }
  const Program& writes() const { return writes_; }

  // Throws what run() would, as far as it can be known before anything is written.
  void check() const;

  // Does the writes [first, last). What is to be read has been read when it returns. Unless `non_blocking`,
  // what was written on the device is there too; on the host it always is.
  void run(size_t first, size_t last, bool non_blocking) const;

 private:
  // A write, or a part of it that fits into a slot: first those loops in which the host's memory advances, in
  // its order, then those in which it repeats.
  struct Piece {
    char* dst;
    const char* src;
    Type to, from, between;
    uint32_t dims;
    uint8_t rank, advancing;
    int64_t bytes;  // in a slot
  };

  void add_piece(char* dst, const char* src, Type to, Type from, Dim* dims, int rank, int advancing);
  void to_slot(const Piece& piece, char* slot, Program& program) const;
  void from_slot(const Piece& piece, const char* slot, Program& program) const;
  int64_t bytes_of(size_t first, size_t last) const;
  bool may_be_written(size_t first, size_t last) const;
  void run_to_device(size_t first, size_t last, bool non_blocking) const;
  void run_to_host(size_t first, size_t last) const;

  int where_;
  bool to_device_;
  std::vector<Piece> pieces_;
  std::vector<size_t> ends_;  // for each write, the number of pieces up to its end
  std::vector<Dim> dims_;
  int64_t largest_ = 0;  // piece
  Program writes_;
};

}  // namespace paramkit
