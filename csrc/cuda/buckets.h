// Sorts jobs by kind, length and blocks into the sections of packets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "cuda/pack.h"
#include "cuda/packet.h"

namespace paramkit::cuda {

class Buckets {
 public:
  // `unit`: bytes that a block moves; `most`: bytes of a packet.
  Buckets(const Machine& machine, int64_t unit, size_t most) : machine_(machine), unit_(unit), most_(most) {}

  // Adds a job of `size` bytes with `n` loops behind it. `blocks`: that do it together; 0: it shares one.
  // `bytes`: that it moves.
  void push(Kind kind, const void* job, size_t size, const Loop* loops, int n, uint32_t blocks, int64_t bytes);

  // All packets, the last one included.
  std::vector<Packet> take();

 private:
  struct Key {
    Kind kind;
    uint32_t stride, blocks;  // blocks 0: several jobs share one
    bool operator<(const Key& o) const {
      // Those with many blocks first, so that the small ones fill the gaps at the end.
      return std::tie(o.blocks, kind, stride) < std::tie(blocks, o.kind, o.stride);
    }
    bool operator==(const Key& o) const { return kind == o.kind && stride == o.stride && blocks == o.blocks; }
  };
  struct Bucket {
    std::vector<uint64_t> words;
    uint32_t count = 0;
    int64_t bytes = 0;
  };

  uint32_t each_of(const Bucket& bucket) const;
  void flush();

  Machine machine_;
  int64_t unit_;
  size_t most_;
  std::map<Key, Bucket> buckets_;
  Key last_key_{};
  Bucket* last_ = nullptr;
  size_t size_ = sizeof(Header);
  uint64_t blocks_ = 0;  // at most
  std::vector<Packet> packets_;
};

}  // namespace paramkit::cuda
