#include "cuda/pack.h"

#include <algorithm>
#include <cstring>

#include "core/classify.h"
#include "core/normalize.h"
#include "cuda/buckets.h"

namespace paramkit::cuda {

namespace {

// What is chosen here is chosen by counting bytes and warps; no GPU has measured it yet.

// Jobs that move fewer bytes are done by a warp each, several in a block.
constexpr int64_t kSmall = 4096;

// Rows from this length on that are not aligned alike are worth a warp each.
constexpr int64_t kLongRow = 512;
constexpr int64_t kRowPiece = 8192;

// The kernels count groups, and tiles, in 31 bits; what has more is cut first.
constexpr int64_t kMostElements = int64_t{1} << 30;

// A run of a transpose shorter than this leaves most of a tile empty.
constexpr int64_t kLeastTile = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint64_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// The largest power of two up to `most` that divides all of `bits`, which is an or of numbers.
int64_t alignment_of(uint64_t bits, int64_t most) {
  const uint64_t all = bits | static_cast<uint64_t>(most);
  return static_cast<int64_t>(all & (~all + 1));
}

// A write on its way into a packet: loops, outermost first, around a run.
struct Part {
  char* dst;
  const char* src;
  int64_t run;
  int rank;
  Dim dims[kMaxRank];
  const Task* task;

  int64_t width() const { return task->width(); }
  int64_t src_width() const { return task->src_width(); }
  bool fills() const { return task->family == Family::Fill || task->number; }

  int64_t turns() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dims[i].size;
    return n;
  }
  int64_t elements() const { return run / width() * turns(); }
  int64_t bytes() const {
    const int64_t n = elements();
    return fills() ? n * width() : n * (width() + src_width()) / 2;
  }

  // All strides of the loops, or'ed.
  uint64_t dst_strides() const {
    uint64_t bits = 0;
    for (int i = 0; i < rank; ++i) bits |= static_cast<uint64_t>(dims[i].dst);
    return bits;
  }
  uint64_t src_strides() const {
    uint64_t bits = 0;
    for (int i = 0; i < rank; ++i) bits |= static_cast<uint64_t>(dims[i].src);
    return bits;
  }

  // In two about equal halves; this becomes the first one.
  Part split() {
    Part second = *this;
    if (rank == 0) {
      const int64_t n = run / width() / 2 / 128 * 128;
      run = n * width();
      second.run -= run;
      second.dst += run;
      if (!fills()) second.src += n * src_width();
      return second;
    }
    Dim& outer = dims[0];
    const int64_t n = outer.size / 2;
    second.dims[0].size -= n;
    second.dst += n * outer.dst;
    second.src += n * outer.src;
    outer.size = n;
    second.drop_ones();
    drop_ones();
    return second;
  }

 private:
  void drop_ones() {
    if (dims[0].size != 1) return;
    std::copy(dims + 1, dims + rank, dims);
    --rank;
  }
};

// The elements that are converted at once: 16 bytes of the wider type; what goes through 64-bit integers at
// most four, so that they stay in registers.
int64_t elements_of(Type to, Type from) {
  const int64_t most = std::min<int64_t>(8, 16 / std::max(width_of(to), width_of(from)));
  const bool integer = from >= Type::Int8;
  return integer ? std::min<int64_t>(4, most) : most;
}

Loop loop_of(int64_t size, int64_t dst, int64_t src) {
  Loop loop{};
  loop.by = divisor_of(static_cast<uint32_t>(size));
  loop.dst = dst;
  loop.src = src;
  return loop;
}

class Packer {
 public:
  Packer(const Machine& machine, int64_t unit, size_t most) : unit_(unit), buckets_(machine, unit, most) {}

  void add(const Program& program, const Task& task) {
    if (task.family == Family::Copy && !task.casts() && !task.number) return add_copy(task.dst, task.src, task.run);
    Part part;
    part.dst = task.dst;
    part.src = task.src;
    part.run = task.run;
    part.rank = task.rank;
    part.task = &task;
    std::copy_n(program.dims.data() + task.dims, task.rank, part.dims);
    if (task.family == Family::Transpose && add_tiles(part)) return;
    // The innermost loop last, whatever order the family wanted.
    sort_dims(part.dims, part.rank, [](const Dim& a, const Dim& b) { return a.dst > b.dst; });
    add_parts(part);
  }

  std::vector<Packet> take() { return buckets_.take(); }

 private:
  uint32_t blocks_for(int64_t bytes) const {
    return bytes <= kSmall ? 0 : static_cast<uint32_t>(ceil_div(bytes, unit_));
  }

  void add_copy(char* dst, const char* src, int64_t bytes) {
    const CopyJob job{address(dst), address(src), static_cast<uint64_t>(bytes)};
    buckets_.push(Kind::Copy, &job, sizeof(job), nullptr, 0, blocks_for(bytes), bytes);
  }

  void add_parts(Part& part) {
    if (part.elements() > kMostElements) {
      Part second = part.split();
      add_parts(part);
      return add_parts(second);
    }
    if (part.fills()) return add_fill(part);
    if (part.task->casts()) return add_cast(part);
    if (part.rank == 0) return add_copy(part.dst, part.src, part.run);
    add_moves(part);
  }

  // Loops around groups of `store` bytes in the destination, `load` in the source, `run` bytes of them side by
  // side.
  void add_flat(FlatJob& job, const Part& part, int64_t load) {
    Loop loops[kMaxRank + 1];
    int n = 0;
    if (part.run > job.store || part.rank == 0) loops[n++] = loop_of(part.run / job.store, job.store, load);
    for (int i = part.rank; i-- > 0;) loops[n++] = loop_of(part.dims[i].size, part.dims[i].dst, part.dims[i].src);
    job.n = static_cast<uint32_t>(part.run / job.store * part.turns());
    job.rank = static_cast<uint8_t>(n);
    job.to = part.task->to, job.from = part.task->from;
    const int64_t bytes = part.bytes();
    buckets_.push(Kind::Flat, &job, sizeof(job), loops, n, blocks_for(bytes), bytes);
  }

  // Takes single elements off both ends of one contiguous run, so that the groups between are aligned.
  static void take_ends(FlatJob& job, Part& part, int64_t head, int64_t elements) {
    const int64_t n = part.run / part.width() - head;
    job.head = static_cast<uint8_t>(head);
    job.tail = static_cast<uint8_t>(n % elements);
    part.run = n / elements * elements * part.width();
    part.dst += head * part.width();
    if (!part.fills()) part.src += head * part.src_width();
  }

  void add_fill(Part& part) {
    FlatJob job{};
    const int64_t width = part.width();
    int64_t store = alignment_of(address(part.dst) | part.dst_strides() | static_cast<uint64_t>(part.run), 16);
    if (part.rank == 0) {
      const int64_t n = part.run / width, elements = 16 / width;
      const int64_t head = static_cast<int64_t>(-address(part.dst) & 15) / width;
      if (n >= head + elements) {
        take_ends(job, part, head, elements);
        store = 16;
      }
    }
    job.store = static_cast<uint8_t>(store);
    job.elements = static_cast<uint8_t>(store / width);
    job.dst = address(part.dst);
    if (part.task->number) {
      for (int64_t i = 0; i < 16; i += width) std::memcpy(job.value + i, part.src, static_cast<size_t>(width));
    } else {
      job.src = address(part.src);
      job.load = static_cast<uint8_t>(part.src_width());
      job.repeat = static_cast<uint8_t>(width);
    }
    add_flat(job, part, 0);
  }

  void add_cast(Part& part) {
    FlatJob job{};
    const int64_t width = part.width(), src_width = part.src_width();
    int64_t elements = elements_of(part.task->to, part.task->from);
    if (part.rank == 0) {
      const int64_t n = part.run / width;
      int64_t head = 0;
      const auto fits = [&](int64_t h) {
        return ((address(part.dst) + static_cast<uint64_t>(h * width)) % static_cast<uint64_t>(elements * width)) ==
                   0 &&
               ((address(part.src) + static_cast<uint64_t>(h * src_width)) %
                static_cast<uint64_t>(elements * src_width)) == 0;
      };
      for (;; elements /= 2) {
        for (head = 0; head < elements && !fits(head); ++head) {
        }
        if (elements == 1 || (head < elements && n >= head + elements)) break;
      }
      if (elements == 1) head = 0;
      take_ends(job, part, head, elements);
    } else {
      const uint64_t dst = address(part.dst) | part.dst_strides() | static_cast<uint64_t>(part.run);
      const uint64_t src = address(part.src) | part.src_strides() | static_cast<uint64_t>(part.run / width * src_width);
      elements = std::min({elements, alignment_of(dst, 16) / width, alignment_of(src, 16) / src_width});
    }
    job.dst = address(part.dst);
    job.src = address(part.src);
    job.store = static_cast<uint8_t>(elements * width);
    job.load = static_cast<uint8_t>(elements * src_width);
    job.elements = static_cast<uint8_t>(elements);
    add_flat(job, part, job.load);
  }

  void add_moves(Part& part) {
    const uint64_t bits = address(part.dst) | address(part.src) | part.dst_strides() | part.src_strides();
    const int64_t group = alignment_of(bits | static_cast<uint64_t>(part.run), 16);
    if (part.run / group * part.turns() > kMostElements) {  // groups may be smaller than elements
      Part second = part.split();
      add_parts(part);
      return add_parts(second);
    }
    if (group < 16 && part.run >= kLongRow && part.turns() * ceil_div(part.run, kRowPiece) <= kMostElements) {
      return add_rows(part);
    }
    FlatJob job{};
    job.dst = address(part.dst);
    job.src = address(part.src);
    job.store = job.load = static_cast<uint8_t>(group);
    job.elements = 1;
    add_flat(job, part, group);
  }

  void add_rows(const Part& part) {
    RowsJob job{};
    const int64_t pieces = ceil_div(part.run, kRowPiece);
    job.dst = address(part.dst);
    job.src = address(part.src);
    job.run = static_cast<uint64_t>(part.run);
    job.piece = static_cast<uint64_t>(std::min(part.run, kRowPiece));
    job.n = static_cast<uint32_t>(part.turns() * pieces);
    Loop loops[kMaxRank + 1];
    int n = 0;
    loops[n++] = loop_of(pieces, kRowPiece, kRowPiece);
    for (int i = part.rank; i-- > 0;) loops[n++] = loop_of(part.dims[i].size, part.dims[i].dst, part.dims[i].src);
    job.rank = static_cast<uint32_t>(n);
    const int64_t bytes = part.bytes();
    buckets_.push(Kind::Rows, &job, sizeof(job), loops, n, blocks_for(bytes), bytes);
  }

  // False if tiles are not worth it: small, thin, or elements that are not aligned to their width.
  bool add_tiles(const Part& part) {
    const Task& task = *part.task;
    const auto [across, along] = runs_of(task, part.dims);
    const int64_t width = task.run, src_width = task.casts() ? task.src_width() : width;
    const int inner = task.across + task.along, outer_loops = task.rank - inner;
    int64_t outer = 1;
    for (int i = 0; i < outer_loops; ++i) outer *= part.dims[i].size;
    if (part.bytes() <= kSmall || across < kLeastTile || along < kLeastTile) return false;
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    const int64_t tiles_across = ceil_div(across, tile_across(static_cast<int>(src_width)));
    const int64_t tiles_along = ceil_div(along, tile_along(static_cast<int>(src_width)));
    if (across > kMost || along > kMost || outer > kMost / tiles_across / tiles_along) return false;

    // What a cell on either side may begin at. The runs themselves are dense.
    uint64_t dst = address(part.dst), src = address(part.src);
    for (int i = 0; i < task.rank; ++i) {
      if (i < task.rank - task.along) dst |= static_cast<uint64_t>(part.dims[i].dst);
      if (i < outer_loops || i >= task.rank - task.along) src |= static_cast<uint64_t>(part.dims[i].src);
    }
    if (alignment_of(dst, 16) < width || alignment_of(src, 16) < src_width) return false;
    // Cells are of the source, and converted on the way out.
    const int64_t elements = src_width < 4 ? 4 / src_width : 1;
    if (elements * width > 16) return false;

    TilesJob job{};
    job.dst = address(part.dst);
    job.src = address(part.src);
    job.across = static_cast<uint32_t>(across);
    job.along = static_cast<uint32_t>(along);
    job.tiles_across = static_cast<uint32_t>(tiles_across);
    job.tiles_along = static_cast<uint32_t>(tiles_along);
    job.width = static_cast<uint8_t>(width);
    job.src_width = static_cast<uint8_t>(src_width);
    job.to = task.to, job.from = task.from;
    job.outer_loops = static_cast<uint8_t>(outer_loops);
    job.across_loops = task.across, job.along_loops = task.along;
    if (alignment_of(dst, 16) >= elements * width) job.aligned |= kStores;
    if (alignment_of(src, 16) >= elements * src_width) job.aligned |= kLoads;
    Loop loops[kMaxRank];
    int n = 0;
    const auto put = [&](int begin, int end) {
      for (int i = end; i-- > begin;) loops[n++] = loop_of(part.dims[i].size, part.dims[i].dst, part.dims[i].src);
    };
    put(0, outer_loops);
    put(outer_loops, outer_loops + task.across);
    put(outer_loops + task.across, task.rank);
    buckets_.push(Kind::Tiles, &job, sizeof(job), loops, n, static_cast<uint32_t>(outer * tiles_across * tiles_along),
                  part.bytes());
    return true;
  }

  int64_t unit_;
  Buckets buckets_;
};

}  // namespace

Divisor divisor_of(uint32_t size) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < size) ++shift;
  const uint64_t magic = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - size)) / size + 1;
  return {size, static_cast<uint32_t>(magic), shift};
}

int64_t block_bytes(int64_t total, const Machine& machine) {
  // At least 32 blocks for each multiprocessor, as long as a block gets a warp's worth of work for each warp:
  // then the last ones that run cost little. Above 32 KiB a block has nothing more to gain by it.
  const int64_t even = total / (int64_t{machine.multiprocessors} * 32);
  return std::clamp<int64_t>((even + 1023) / 1024 * 1024, 4 << 10, 32 << 10);
}

std::vector<Packet> pack(const Program& program, size_t first, size_t last, const Machine& machine, size_t most) {
  // A number of bytes that is too large only for parts of a program does no harm.
  Packer packer(machine, block_bytes(program.bytes, machine), most);
  for (size_t t = first; t < last; ++t) packer.add(program, program.tasks[t]);
  return packer.take();
}

}  // namespace paramkit::cuda
