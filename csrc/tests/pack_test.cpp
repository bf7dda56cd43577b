// The packing by itself, with addresses that nobody reads: sizes that no test machine has memory for. What the
// jobs of a packet say is worked out here a second time, with plain divisions, and compared with the tasks.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "core/classify.h"
#include "core/task.h"
#include "cuda/pack.h"

namespace {

using namespace paramkit;
using namespace paramkit::cuda;

int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      if (++failures > 20) std::exit(1);                          \
    }                                                             \
  } while (false)

uint32_t divided(uint32_t n, const Divisor& by) {
  return (static_cast<uint32_t>((uint64_t{n} * by.magic) >> 32) + n) >> by.shift;
}

void test_divisors() {
  std::mt19937_64 random(1);
  const auto try_size = [&](uint32_t size) {
    const Divisor by = divisor_of(size);
    const uint32_t most = (uint32_t{1} << 31) - 1;
    std::vector<uint32_t> numbers{0, 1, size - 1, size, most, most - 1, most / size * size, most / size * size - 1};
    for (int i = 0; i < 50; ++i) numbers.push_back(static_cast<uint32_t>(random() & most));
    for (uint32_t n : numbers) {
      if (n <= most) CHECK(divided(n, by) == n / size, "%u / %u", n, size);
    }
  };
  for (uint32_t size = 1; size < 3000; ++size) try_size(size);
  for (int shift = 1; shift < 31; ++shift) {
    for (int64_t d = -2; d <= 2; ++d) try_size(static_cast<uint32_t>(std::max<int64_t>((int64_t{1} << shift) + d, 1)));
  }
  for (int i = 0; i < 2000; ++i) try_size(static_cast<uint32_t>(random() % ((uint64_t{1} << 31) - 1)) + 1);
}

// What a packet's jobs write: runs of bytes of the destination and where they come from.
struct Run {
  uint64_t dst, src, bytes;
  bool operator<(const Run& o) const { return dst < o.dst; }
};

// The offset of turn number `turn` of all loops, innermost first.
void offsets(const Loop* loops, uint32_t rank, uint64_t turn, int64_t* dst, int64_t* src) {
  *dst = *src = 0;
  for (uint32_t d = 0; d < rank; ++d) {
    const uint64_t size = loops[d].by.size;
    const uint64_t here = d + 1 < rank ? turn % size : turn;
    *dst += static_cast<int64_t>(here) * loops[d].dst;
    *src += static_cast<int64_t>(here) * loops[d].src;
    turn /= size;
  }
}

uint64_t turns(const Loop* loops, uint32_t rank) {
  uint64_t n = 1;
  for (uint32_t d = 0; d < rank; ++d) n *= loops[d].by.size;
  return n;
}

// Of one job: the bytes it writes in all; and runs, of all turns or, if there are too many, of a few.
uint64_t look_at(Kind kind, const char* job, std::vector<Run>& runs, uint64_t most) {
  const auto each = [&](uint64_t n, auto one) {
    if (n <= most) {
      for (uint64_t i = 0; i < n; ++i) one(i);
      return;
    }
    for (uint64_t i : {uint64_t{0}, uint64_t{1}, n / 3, n / 2, n - 2, n - 1}) one(i);
  };
  switch (kind) {
    case Kind::Copy: {
      const auto& copy = *reinterpret_cast<const CopyJob*>(job);
      runs.push_back({copy.dst, copy.src, copy.bytes});
      return copy.bytes;
    }
    case Kind::Rows: {
      const auto& rows = *reinterpret_cast<const RowsJob*>(job);
      const auto* loops = reinterpret_cast<const Loop*>(&rows + 1);
      CHECK(turns(loops, rows.rank) == rows.n, "%u pieces", rows.n);
      each(rows.n, [&](uint64_t i) {
        int64_t dst = 0, src = 0;
        offsets(loops, rows.rank, i, &dst, &src);
        const uint64_t piece = i % loops[0].by.size;
        runs.push_back({rows.dst + static_cast<uint64_t>(dst), rows.src + static_cast<uint64_t>(src),
                        std::min(rows.piece, rows.run - piece * rows.piece)});
      });
      return rows.n / loops[0].by.size * rows.run;
    }
    case Kind::Flat: {
      const auto& flat = *reinterpret_cast<const FlatJob*>(job);
      const auto* loops = reinterpret_cast<const Loop*>(&flat + 1);
      CHECK(turns(loops, flat.rank) == flat.n, "%u groups", flat.n);
      CHECK(flat.n < (uint32_t{1} << 31), "%u groups", flat.n);
      const bool value = flat.load == 0;
      const uint64_t width = flat.store / flat.elements;
      const uint64_t src_width = value || flat.repeat != 0 ? 0 : flat.load / flat.elements;
      each(flat.n, [&](uint64_t i) {
        int64_t dst = 0, src = 0;
        offsets(loops, flat.rank, i, &dst, &src);
        CHECK((flat.dst + static_cast<uint64_t>(dst)) % flat.store == 0, "a store that is not aligned");
        if (!value) CHECK((flat.src + static_cast<uint64_t>(src)) % flat.load == 0, "a load that is not aligned");
        for (uint64_t e = 0; e < flat.elements; ++e) {
          runs.push_back({flat.dst + static_cast<uint64_t>(dst) + e * width,
                          value ? 0 : flat.src + static_cast<uint64_t>(src) + e * src_width, width});
        }
      });
      const uint64_t end = uint64_t{flat.n} * flat.elements;
      for (uint64_t e = 0; e < flat.head; ++e) {
        runs.push_back({flat.dst - (e + 1) * width, value ? 0 : flat.src - (e + 1) * src_width, width});
      }
      for (uint64_t e = 0; e < flat.tail; ++e) {
        runs.push_back({flat.dst + (end + e) * width, value ? 0 : flat.src + (end + e) * src_width, width});
      }
      return (end + flat.head + flat.tail) * width;
    }
    default: {
      const auto& tiles = *reinterpret_cast<const TilesJob*>(job);
      const auto* loops = reinterpret_cast<const Loop*>(&tiles + 1);
      const auto* across = loops + tiles.outer_loops;
      const auto* along = across + tiles.across_loops;
      const uint64_t outer = turns(loops, tiles.outer_loops);
      CHECK(turns(across, tiles.across_loops) == tiles.across, "%u across", tiles.across);
      CHECK(turns(along, tiles.along_loops) == tiles.along, "%u along", tiles.along);
      const uint64_t all = outer * tiles.across * tiles.along;
      each(all, [&](uint64_t i) {
        int64_t d[3], s[3];
        offsets(loops, std::max<uint32_t>(tiles.outer_loops, 1),
                tiles.outer_loops == 0 ? 0 : i / tiles.along / tiles.across, d, s);
        if (tiles.outer_loops == 0) d[0] = s[0] = 0;
        offsets(across, tiles.across_loops, i / tiles.along % tiles.across, d + 1, s + 1);
        offsets(along, tiles.along_loops, i % tiles.along, d + 2, s + 2);
        // What the kernel takes for granted: each is one run on its side.
        CHECK(s[1] == static_cast<int64_t>(i / tiles.along % tiles.across * tiles.src_width), "across is no run");
        CHECK(d[2] == static_cast<int64_t>(i % tiles.along * tiles.width), "along is no run");
        runs.push_back({tiles.dst + static_cast<uint64_t>(d[0] + d[1] + d[2]),
                        tiles.src + static_cast<uint64_t>(s[0] + s[1] + s[2]), tiles.width});
      });
      return all * tiles.width;
    }
  }
}

// The sections of a packet, checked, and what their jobs write.
uint64_t look_at(const Packet& packet, std::vector<Run>& runs, uint64_t most, std::map<Kind, int>* kinds = nullptr) {
  const auto& header = *reinterpret_cast<const Header*>(packet.data());
  const auto* sections = reinterpret_cast<const Section*>(packet.data() + sizeof(Header));
  uint64_t block = 0, bytes = 0, end = sizeof(Header) + header.sections * sizeof(Section);
  for (uint32_t i = 0; i < header.sections; ++i) {
    const Section& section = sections[i];
    CHECK(section.first == block, "section %u begins at block %u, not %lu", i, section.first, block);
    CHECK(section.jobs == end, "section %u: jobs at %u, not %lu", i, section.jobs, end);
    CHECK((section.each == 0) != (section.blocks == 0), "section %u", i);
    if (section.each != 0) {
      CHECK(section.each % kWarps == 0 && section.kind != Kind::Tiles, "section %u", i);
      block += (section.count + section.each - 1) / section.each;
    } else {
      block += uint64_t{section.count} * section.blocks;
    }
    for (uint32_t j = 0; j < section.count; ++j) {
      bytes += look_at(section.kind, packet.data() + section.jobs + uint64_t{j} * section.stride, runs, most);
      if (kinds != nullptr) ++(*kinds)[section.kind];
    }
    end += uint64_t{section.count} * section.stride;
  }
  CHECK(block == packet.blocks && block == header.blocks, "%lu blocks, not %lu", packet.blocks, block);
  CHECK(end == packet.size(), "%lu bytes, not %lu", packet.size(), end);
  return bytes;
}

// The source byte of each destination byte, as the task says it: 0 for a number.
void expected(const Program& program, const Task& task, std::map<uint64_t, uint64_t>& bytes) {
  const Dim* dims = program.dims.data() + task.dims;
  const int64_t width = task.width(), src_width = task.src_width();
  const bool fill = task.family == Family::Fill || task.number;
  std::vector<int64_t> index(task.rank, 0);
  while (true) {
    auto dst = reinterpret_cast<uint64_t>(task.dst), src = reinterpret_cast<uint64_t>(task.src);
    for (size_t i = 0; i < task.rank; ++i) {
      dst += static_cast<uint64_t>(index[i] * dims[i].dst);
      src += static_cast<uint64_t>(index[i] * dims[i].src);
    }
    for (int64_t e = 0; e < task.run / width; ++e) {
      // A cast is judged by the beginning of its elements.
      for (int64_t b = 0; b < (task.casts() || fill ? 1 : width); ++b) {
        bytes[dst + static_cast<uint64_t>(e * width + b)] =
            task.number ? 0 : src + static_cast<uint64_t>(fill ? 0 : e * src_width + b);
      }
    }
    int i = static_cast<int>(task.rank) - 1;
    for (; i >= 0; --i) {
      if (++index[static_cast<size_t>(i)] < dims[i].size) break;
      index[static_cast<size_t>(i)] = 0;
    }
    if (i < 0) return;
  }
}

const Type kSome[] = {Type::Float64, Type::Float32, Type::BFloat16, Type::Float8E4M3FN, Type::Int64, Type::UInt8};

// A list of random writes, every byte of which must come from where it should, whatever the packets' size.
void test_random_lists() {
  std::mt19937_64 random(2);
  const auto pick = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  static char number[16];
  for (int round = 0; round < 400; ++round) {
    Program program;
    uint64_t dst = 1 << 20, src = uint64_t{1} << 40;
    const int64_t writes = 1 + pick(20);
    for (int64_t w = 0; w < writes; ++w) {
      Type to = kSome[pick(6)], from = pick(2) != 0 ? to : kSome[pick(6)];
      Dim dims[4];
      const int rank = static_cast<int>(pick(5));
      int order[4] = {0, 1, 2, 3};
      std::shuffle(order, order + rank, random);
      int64_t reach = width_of(to) * (1 + pick(2)), src_reach = width_of(from);
      for (int i = rank; i-- > 0;) {
        dims[i].size = 1 + pick(rank > 2 ? 8 : 40);
        dims[i].dst = reach;
        reach *= dims[i].size + (pick(3) == 0 ? pick(3) : 0);
      }
      for (int i = 0; i < rank; ++i) {
        Dim& dim = dims[order[i]];
        dim.src = pick(6) == 0 ? 0 : src_reach;
        src_reach *= dim.size + (pick(4) == 0 ? 1 : 0);
      }
      const bool moved = to == from, is_number = moved && pick(6) == 0;
      // Only what is moved may lie anywhere, and fills and casts where elements are.
      dst = (dst + 15) / 16 * 16 + static_cast<uint64_t>(pick(16) * width_of(to) % 16);
      src = (src + 15) / 16 * 16 + static_cast<uint64_t>(pick(16) * width_of(from) % 16);
      if (is_number) {
        for (int i = 0; i < rank; ++i) dims[i].src = 0;
      }
      const size_t before = program.tasks.size();
      const bool added =
          program.add(reinterpret_cast<void*>(dst),
                      is_number ? static_cast<void*>(number) : reinterpret_cast<void*>(src), to, from, dims, rank);
      CHECK(added, "round %d", round);
      if (is_number && program.tasks.size() > before) program.make_number();
      dst += static_cast<uint64_t>(reach) + 64;
      src += static_cast<uint64_t>(src_reach) + 64;
    }
    std::map<uint64_t, uint64_t> want;
    uint64_t bytes = 0;
    for (const Task& task : program.tasks) expected(program, task, want);
    for (const size_t most : {SIZE_MAX, size_t{4080}, size_t{1024}}) {
      const auto packets = pack(program, 0, program.tasks.size(), {static_cast<int>(1 + pick(200)), true}, most);
      std::vector<Run> runs;
      bytes = 0;
      for (const Packet& packet : packets) {
        CHECK(packet.size() <= most, "round %d: a packet of %lu bytes", round, packet.size());
        bytes += look_at(packet, runs, UINT64_MAX);
      }
      CHECK(bytes == static_cast<uint64_t>(program.bytes), "round %d: %lu bytes of %ld", round, bytes, program.bytes);
      std::sort(runs.begin(), runs.end());
      for (size_t i = 1; i < runs.size(); ++i) {
        CHECK(runs[i - 1].dst + runs[i - 1].bytes <= runs[i].dst, "round %d: written twice", round);
      }
      for (const auto& [to, from] : want) {
        const auto after = std::upper_bound(runs.begin(), runs.end(), Run{to, 0, 0});
        const bool inside = after != runs.begin() && to < (after - 1)->dst + (after - 1)->bytes;
        CHECK(inside, "round %d: a byte is not written", round);
        if (!inside || from == 0) continue;
        const Run& run = *(after - 1);
        const uint64_t got = run.src + (to - run.dst);
        CHECK(got == from, "round %d: byte %lu comes from %lu, not %lu", round, to, got, from);
      }
    }
  }
}

Packet only(const Program& program) {
  auto packets = pack(program, 0, program.tasks.size(), {132, true});
  CHECK(packets.size() == 1, "%lu packets", packets.size());
  return packets.at(0);
}

// More than 2**31 elements: cut into jobs that count in 31 bits, and nothing lost.
void test_huge() {
  const int64_t n = (int64_t{1} << 33) + 12345;
  auto* const dst = reinterpret_cast<char*>(uint64_t{1} << 30);
  auto* const src = reinterpret_cast<char*>(uint64_t{1} << 42);
  struct Case {
    const char* what;
    Type to, from;
    std::vector<Dim> dims;
    int64_t phase = 0;  // of the destination
  };
  const std::vector<Case> cases = {
      {"copy", Type::UInt8, Type::UInt8, {{n, 1, 1}}},
      {"cast", Type::Float32, Type::BFloat16, {{n, 4, 2}}},
      {"fill", Type::BFloat16, Type::BFloat16, {{n, 2, 0}}},
      {"two long rows", Type::UInt8, Type::UInt8, {{2, 2 * n, n}, {n, 1, 1}}},
      {"every other", Type::Float32, Type::Float32, {{n, 8, 4}}},
      {"rows", Type::BFloat16, Type::BFloat16, {{n / 1000, 2002, 2000}, {1000, 2, 2}}},
      {"transpose", Type::Float32, Type::Float32, {{100'000, 4 * 100'000, 4}, {100'000, 4, 4 * 100'000}}},
      {"long transpose", Type::UInt8, Type::UInt8, {{n / 16, 16, 1}, {16, 1, n / 16}}},
      // 2^28 rows of 16 bytes, of which each byte is a group: 2^32 groups of fewer elements.
      {"short rows", Type::UInt8, Type::UInt8, {{int64_t{1} << 28, 17, 16}, {16, 1, 1}}, 1},
  };
  for (const Case& each : cases) {
    Program program;
    CHECK(program.add(dst + each.phase, src, each.to, each.from, each.dims.data(), static_cast<int>(each.dims.size())),
          "%s", each.what);
    std::vector<Run> runs;
    uint64_t bytes = 0;
    for (const Packet& packet : pack(program, 0, 1, {132, true})) bytes += look_at(packet, runs, 1000);
    CHECK(bytes == static_cast<uint64_t>(program.bytes), "%s: %lu bytes of %ld", each.what, bytes, program.bytes);
    // The last element.
    int64_t last = 0;
    for (const Dim& dim : each.dims) last += (dim.size - 1) * dim.dst;
    const uint64_t end = reinterpret_cast<uint64_t>(dst) + static_cast<uint64_t>(each.phase + last + width_of(each.to));
    const auto highest = std::max_element(runs.begin(), runs.end(),
                                          [](const Run& a, const Run& b) { return a.dst + a.bytes < b.dst + b.bytes; });
    CHECK(highest->dst + highest->bytes == end, "%s: ends at %lu, not %lu", each.what, highest->dst + highest->bytes,
          end);
  }
}

// Which kind of job a write becomes, and how it is cut.
void test_kinds() {
  auto* const dst = reinterpret_cast<char*>(uint64_t{1} << 30);
  auto* const src = reinterpret_cast<char*>(uint64_t{1} << 42);
  const auto kinds_of = [&](char* to, const std::vector<Dim>& dims, Type type) {
    Program program;
    CHECK(program.add(to, src, type, type, dims.data(), static_cast<int>(dims.size())), "add");
    std::map<Kind, int> kinds;
    std::vector<Run> runs;
    look_at(only(program), runs, 100, &kinds);
    CHECK(kinds.size() == 1, "%lu kinds", kinds.size());
    return kinds.begin()->first;
  };
  CHECK(kinds_of(dst, {{100, 4, 4}}, Type::Float32) == Kind::Copy, "contiguous");
  CHECK(kinds_of(dst, {{100, 800, 400}, {100, 4, 4}}, Type::Float32) == Kind::Flat, "aligned rows");
  CHECK(kinds_of(dst + 2, {{100, 802, 400}, {100, 2, 2}}, Type::BFloat16) == Kind::Flat, "short rows");
  CHECK(kinds_of(dst + 2, {{100, 4002, 4000}, {1000, 2, 2}}, Type::BFloat16) == Kind::Rows, "long rows");
  CHECK(kinds_of(dst, {{512, 2048, 4}, {512, 4, 2048}}, Type::Float32) == Kind::Tiles, "transpose");
  CHECK(kinds_of(dst, {{16, 64, 4}, {16, 4, 64}}, Type::Float32) == Kind::Flat, "small transpose");
  CHECK(kinds_of(dst, {{4000, 8, 4}, {2, 4, 16000}}, Type::Float32) == Kind::Flat, "pairs");

  // Ten thousand small ones are one section; a thousand alike of a MiB too.
  Program small;
  for (int i = 0; i < 10'000; ++i) small.add_contiguous(dst + 4096 * i, src + 4096 * i, 2048, 2);
  const Packet packed = only(small);
  CHECK(reinterpret_cast<const Header*>(packed.data())->sections == 1, "sections");
  CHECK(packed.size() == sizeof(Header) + sizeof(Section) + 10'000 * sizeof(CopyJob), "%lu bytes", packed.size());
  CHECK(packed.blocks >= 4 * 132, "%lu blocks", packed.blocks);
  Program large;
  for (int i = 0; i < 1024; ++i)
    large.add_contiguous(dst + (int64_t{2} << 20) * i, src + (int64_t{2} << 20) * i, 1 << 20, 4);
  CHECK(only(large).size() <= 32736, "1024 tensors alike fit into the arguments: %lu bytes", only(large).size());

  CHECK(block_bytes(1000, {132, true}) == 4096, "least");
  CHECK(block_bytes(int64_t{1} << 40, {132, true}) == 32768, "most");
}

}  // namespace

int main() {
  test_divisors();
  test_random_lists();
  test_huge();
  test_kinds();
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? 0 : 1;
}
