// Transposes, a tile a block:
//
//      source rows, run across k           shared memory: cells of 4 bytes        destination rows, along l
//      l0  k k k k . .                     k0  l l l l . .                        k0  l l l l . .
//      l1  k k k k . .         ->          k1  l l l l . .            ->          k1  l l l l . .
//
// A warp reads 32 cells of a source row, or of as many rows as a cell has elements, which it turns in
// registers, so that elements of one and two bytes go through shared memory in fours and twos too. Rows of
// the tile are an odd number of cells apart, and row k lies at (k mod 4) * 32 + k / 4 (for cells of four
// elements): the 32 cells that a warp writes at once, one into each of 32 rows, lie in 32 banks. Casts are done
// on the way out, where a thread holds one cell.

template <int W>
struct CellOf {
  using Type = uint32_t;
};
template <>
struct CellOf<8> {
  using Type = Raw8;
};
template <>
struct CellOf<16> {
  using Type = Raw;
};

// C rows of one cell each become C columns.
template <int C, class T>
PARAMKIT_FN void turn_cells(T (&r)[C]) {
  if constexpr (C == 2) {
    const uint32_t a = r[0], b = r[1];
    r[0] = __byte_perm(a, b, 0x5410);
    r[1] = __byte_perm(a, b, 0x7632);
  }
  if constexpr (C == 4) {
    const uint32_t a = __byte_perm(r[0], r[1], 0x5140), b = __byte_perm(r[2], r[3], 0x5140);
    const uint32_t c = __byte_perm(r[0], r[1], 0x7362), d = __byte_perm(r[2], r[3], 0x7362);
    r[0] = __byte_perm(a, b, 0x5410);
    r[1] = __byte_perm(a, b, 0x7632);
    r[2] = __byte_perm(c, d, 0x5410);
    r[3] = __byte_perm(c, d, 0x7632);
  }
}

template <class T>
PARAMKIT_FN T cell_of(const Raw& r) {
  if constexpr (sizeof(T) == 16) return r;
  if constexpr (sizeof(T) == 8) return Raw8{{r.w[0], r.w[1]}};
  if constexpr (sizeof(T) == 4) return r.w[0];
}

// Without its first `width` bytes (1, 2, 4 or 8; behind 16 nothing follows).
PARAMKIT_FN Raw shifted(const Raw& r, uint32_t width) {
  if (width == 8) return {{r.w[2], r.w[3], 0, 0}};
  if (width >= 4) return {{r.w[1], r.w[2], r.w[3], 0}};
  return {{r.w[0] >> 8 * width | r.w[1] << (32 - 8 * width), r.w[1] >> 8 * width, 0, 0}};
}

PARAMKIT_FN uint32_t at_most(uint32_t n, uint32_t most) { return n < most ? n : most; }

template <int W>
class TileRun {
  using T = typename CellOf<W>::Type;
  using Shape = Tile<W>;
  static constexpr int C = Shape::kElements;
  static constexpr int kRows = Shape::kAlong / C / kWarps;  // groups of C source rows for each warp, loaded at once

 public:
  PARAMKIT_FN TileRun(const TilesJob& job, char* shared, bool saturates)
      : job_(job),
        loops_(reinterpret_cast<const Loop*>(&job + 1)),
        cells_(reinterpret_cast<T*>(shared)),
        dst_offsets_(reinterpret_cast<int64_t*>(shared + Tile<16>::kBytes)),
        src_offsets_(dst_offsets_ + kTileOffsets),
        saturates_(saturates) {}

  PARAMKIT_FN void run(uint32_t thread, uint32_t unit) {
    const uint32_t l = unit % job_.tiles_along, rest = unit / job_.tiles_along;
    const uint32_t k = rest % job_.tiles_across;
    char* dst = reinterpret_cast<char*>(job_.dst);
    const char* src = reinterpret_cast<const char*>(job_.src);
    if (job_.outer_loops > 0) {
      dst += offset_of<Dst>(loops_, job_.outer_loops, rest / job_.tiles_across);
      src += offset_of<Src>(loops_, job_.outer_loops, rest / job_.tiles_across);
    }
    across_ = at_most(job_.across - k * Shape::kAcross, Shape::kAcross);
    along_ = at_most(job_.along - l * Shape::kAlong, Shape::kAlong);
    set_offsets(thread, k * Shape::kAcross, l * Shape::kAlong);
    __syncthreads();
    read(src + uint64_t{k} * Shape::kAcross * W, thread);
    __syncthreads();
    write(dst + uint64_t{l} * Shape::kAlong * job_.width, thread);
  }

 private:
  // Where the rows of the tile begin: those of the destination, one for each element across, and those of the
  // source, one for each element along.
  PARAMKIT_FN void set_offsets(uint32_t thread, uint32_t first_across, uint32_t first_along) {
    const Loop* across = loops_ + job_.outer_loops;
    const Loop* along = across + job_.across_loops;
    const uint32_t i = thread % kTileOffsets;
    if (thread < kTileOffsets) {
      if (i < across_) dst_offsets_[i] = offset_of<Dst>(across, job_.across_loops, first_across + i);
    } else if (i < along_) {
      src_offsets_[i] = offset_of<Src>(along, job_.along_loops, first_along + i);
    }
  }

  // C elements of one source row from element k of the tile on; those beyond its edge are 0.
  PARAMKIT_FN T read_cell(const char* row, uint32_t k) const {
    if ((job_.aligned & kLoads) != 0 && k + C <= across_) return *place<T>(row + k * W);
    Raw r = {};
    for (uint32_t j = 0; j < C && k + j < across_; ++j) {
      const Raw element = load_one(row + (k + j) * W, W);
      if constexpr (W >= 4) {
        r = element;
      } else {
        r.w[0] |= element.w[0] << (8 * W * j);
      }
    }
    return cell_of<T>(r);
  }

  PARAMKIT_FN void read(const char* src, uint32_t thread) {
    const uint32_t lane = thread % kWarp, warp = thread / kWarp, k = lane * C;
    if (k >= across_) return;
    T cells[kRows][C] = {};
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      const uint32_t group = warp + b * kWarps;
#pragma unroll
      for (int j = 0; j < C; ++j) {
        if (group * C + j < along_) cells[b][j] = read_cell(src + src_offsets_[group * C + j], k);
      }
    }
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      const uint32_t group = warp + b * kWarps;
      turn_cells<C>(cells[b]);
#pragma unroll
      for (int j = 0; j < C; ++j) cells_[(j * kWarp + lane) * Shape::kPitch + group] = cells[b][j];
    }
  }

  PARAMKIT_FN void write(char* dst, uint32_t thread) const {
    const uint32_t lane = thread % kWarp, width = job_.width;
    const Type to_type = job_.to, from_type = job_.from;
    for (uint32_t k = thread / kWarp; k < across_; k += kWarps) {
      const T* row = cells_ + (k % C * kWarp + k / C) * Shape::kPitch;
      char* to = dst + dst_offsets_[k];
      for (uint32_t group = lane; group * C < along_; group += kWarp) {
        const T cell = row[group];
        Raw r = {};
        memcpy(&r, &cell, sizeof(T));
        if constexpr (W <= 8) {
          if (to_type != from_type) r = convert<C>(to_type, from_type, r, saturates_);
        }
        if ((job_.aligned & kStores) != 0 && group * C + C <= along_) {
          store(to + group * C * width, r, C * width);
          continue;
        }
        for (uint32_t j = 0; j < C && group * C + j < along_; ++j) {
          store(to + (group * C + j) * width, r, width);
          r = shifted(r, width);
        }
      }
    }
  }

  const TilesJob& job_;
  const Loop* loops_;
  T* cells_;
  int64_t* dst_offsets_;
  int64_t* src_offsets_;
  bool saturates_;
  uint32_t across_ = 0, along_ = 0;
};

PARAMKIT_FN void run_tile(const TilesJob& job, uint32_t thread, uint32_t unit, char* shared, bool saturates) {
  switch (job.src_width) {
    case 1: return TileRun<1>(job, shared, saturates).run(thread, unit);
    case 2: return TileRun<2>(job, shared, saturates).run(thread, unit);
    case 4: return TileRun<4>(job, shared, saturates).run(thread, unit);
    case 8: return TileRun<8>(job, shared, saturates).run(thread, unit);
    default: return TileRun<16>(job, shared, saturates).run(thread, unit);
  }
}
