#include "cuda/buckets.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace paramkit::cuda {

namespace {

constexpr uint32_t kMostEach = 64;
constexpr uint64_t kMostBlocks = (uint64_t{1} << 31) - 1;  // of a launch

}  // namespace

void Buckets::push(Kind kind, const void* job, size_t size, const Loop* loops, int n, uint32_t blocks, int64_t bytes) {
  const size_t all = size + static_cast<size_t>(n) * sizeof(Loop);
  const Key key{kind, static_cast<uint32_t>(all), blocks};
  Bucket* bucket = last_ != nullptr && key == last_key_ ? last_ : nullptr;
  if (bucket == nullptr) {
    const bool is_new = buckets_.find(key) == buckets_.end();
    if (size_ + all + (is_new ? sizeof(Section) : 0) > most_ || blocks_ + std::max(blocks, 1U) > kMostBlocks) flush();
    const auto [at, added] = buckets_.try_emplace(key);
    if (added) size_ += sizeof(Section);
    bucket = &at->second;
    last_key_ = key;
    last_ = bucket;
  } else if (size_ + all > most_ || blocks_ + std::max(blocks, 1U) > kMostBlocks) {
    flush();
    return push(kind, job, size, loops, n, blocks, bytes);
  }
  const size_t before = bucket->words.size();
  bucket->words.resize(before + all / sizeof(uint64_t));
  std::memcpy(bucket->words.data() + before, job, size);
  if (n > 0) std::memcpy(bucket->words.data() + before + size / sizeof(uint64_t), loops, all - size);
  ++bucket->count;
  bucket->bytes += bytes;
  size_ += all;
  blocks_ += std::max(blocks, 1U);
}

// Jobs that share a block: enough for a warp each, and for a block's worth of bytes.
uint32_t Buckets::each_of(const Bucket& bucket) const {
  const int64_t mean = std::max<int64_t>(bucket.bytes / bucket.count, 1);
  const auto wanted = static_cast<uint32_t>(std::clamp<int64_t>(unit_ / mean / kWarps * kWarps, kWarps, kMostEach));
  const auto spread = static_cast<uint32_t>(machine_.multiprocessors) * 4;
  // Better many blocks of few jobs than multiprocessors without any.
  return bucket.count / wanted >= spread ? wanted : kWarps;
}

void Buckets::flush() {
  last_ = nullptr;
  if (buckets_.empty()) return;
  Packet packet;
  packet.words.reserve(size_ / sizeof(uint64_t));
  Header header{static_cast<uint32_t>(buckets_.size()), machine_.e4m3fn_saturates ? 1U : 0U, 0};
  std::vector<Section> sections;
  uint64_t jobs = sizeof(Header) + buckets_.size() * sizeof(Section);
  for (const auto& [key, bucket] : buckets_) {
    Section section{};
    section.first = static_cast<uint32_t>(header.blocks);
    section.jobs = static_cast<uint32_t>(jobs);
    section.count = bucket.count;
    section.stride = key.stride;
    section.kind = key.kind;
    if (key.blocks == 0) {
      section.each = each_of(bucket);
      header.blocks += (bucket.count + section.each - 1) / section.each;
    } else {
      section.blocks = key.blocks;
      header.blocks += uint64_t{bucket.count} * key.blocks;
    }
    jobs += bucket.words.size() * sizeof(uint64_t);
    sections.push_back(section);
  }
  packet.words.resize((sizeof(Header) + sections.size() * sizeof(Section)) / sizeof(uint64_t));
  std::memcpy(packet.words.data(), &header, sizeof(header));
  std::memcpy(packet.words.data() + sizeof(header) / sizeof(uint64_t), sections.data(),
              sections.size() * sizeof(Section));
  for (const auto& [key, bucket] : buckets_) {
    packet.words.insert(packet.words.end(), bucket.words.begin(), bucket.words.end());
  }
  packet.blocks = header.blocks;
  packets_.push_back(std::move(packet));
  buckets_.clear();
  size_ = sizeof(Header);
  blocks_ = 0;
}

std::vector<Packet> Buckets::take() {
  flush();
  return std::move(packets_);
}

}  // namespace paramkit::cuda
