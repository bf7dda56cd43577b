// Runs of bytes at any alignment. Stores are of 16 bytes, aligned; loads too where source and destination
// lie alike. Otherwise a vector is put together from the aligned words that it lies in: five loads of four
// bytes, of which neighbouring threads share lines.

PARAMKIT_FN void copy_bytes(char* dst, const char* src, uint32_t n, Group group) {
  for (uint32_t i = group.rank; i < n; i += group.size) *place<uint8_t>(dst + i) = *place<uint8_t>(src + i);
}

// n vectors whose source begins `shift` bytes into an aligned word.
PARAMKIT_FN void copy_shifted(char* dst, const char* src, uint64_t n, Group group) {
  const auto shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(src) & 3);
  const auto* words = place<uint32_t>(src - shift);
  constexpr int kVectors = 2;
  for (uint64_t i = group.rank; i < n; i += kVectors * group.size) {
    uint32_t w[kVectors][5];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint64_t at = i + v * group.size < n ? i + v * group.size : n - 1;
#pragma unroll
      for (int j = 0; j < 4; ++j) w[v][j] = words[4 * at + j];
      w[v][4] = shift == 0 ? 0 : words[4 * at + 4];
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Raw r;
#pragma unroll
      for (int j = 0; j < 4; ++j) r.w[j] = __funnelshift_r(w[v][j], w[v][j + 1], 8 * shift);
      if (i + v * group.size < n) store(dst + 16 * (i + v * group.size), r, 16);
    }
  }
}

PARAMKIT_FN void copy_vectors(char* dst, const char* src, uint64_t n, Group group) {
  for (uint64_t i = group.rank; i < n; i += kUnroll * group.size) {
    const char* from[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      from[u] = src + 16 * (i + u * group.size < n ? i + u * group.size : n - 1);
    }
    Raw r[kUnroll];
    load<kUnroll>(r, from, 16);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * group.size < n) store(dst + 16 * (i + u * group.size), r[u], 16);
    }
  }
}

PARAMKIT_FN void copy_run(char* dst, const char* src, uint64_t n, Group group) {
  const uint64_t to_align = -reinterpret_cast<uintptr_t>(dst) & 15;
  uint64_t head = to_align < n ? to_align : n;
  const uint64_t shift = reinterpret_cast<uintptr_t>(src + head) & 3;
  // The word that the first vector begins in must not begin before the source does.
  if (head < shift && n - head >= 16) head += 16;
  uint64_t vectors = (n - head) / 16;
  // Nor may that which the last one ends in end behind it.
  if (shift != 0 && vectors > 0 && n - head - 16 * vectors < 4 - shift) --vectors;
  copy_bytes(dst, src, static_cast<uint32_t>(head), group);
  dst += head, src += head, n -= head;
  if (vectors > 0) {
    if ((reinterpret_cast<uintptr_t>(src) & 15) == 0) {
      copy_vectors(dst, src, vectors, group);
    } else {
      copy_shifted(dst, src, vectors, group);
    }
  }
  copy_bytes(dst + 16 * vectors, src + 16 * vectors, static_cast<uint32_t>(n - 16 * vectors), group);
}

PARAMKIT_FN void run_copy(const CopyJob& job, Group group, uint32_t part, uint32_t parts) {
  // Parts end where the destination's lines of 128 bytes do.
  const uint64_t phase = job.dst & 127;
  const Share share = share_of(job.bytes + phase, part, parts, 128);
  const uint64_t begin = share.begin > phase ? share.begin - phase : 0;
  const uint64_t end = share.end > phase ? share.end - phase : 0;
  copy_run(reinterpret_cast<char*>(job.dst) + begin, reinterpret_cast<const char*>(job.src) + begin, end - begin,
           group);
}

// A warp a piece of a row.
PARAMKIT_FN void run_rows(const RowsJob& job, Group group, uint32_t part, uint32_t parts) {
  const auto* loops = reinterpret_cast<const Loop*>(&job + 1);
  const Share share = share_of(job.n, part, parts, kWarps);
  const Group warp{group.rank % kWarp, kWarp};
  for (uint64_t i = share.begin + group.rank / kWarp; i < share.end; i += group.size / kWarp) {
    const auto turn = static_cast<uint32_t>(i);
    // The innermost loop is that over the pieces of a row.
    const uint32_t piece = turn - divide(turn, loops[0].by) * loops[0].by.size;
    const uint64_t left = job.run - piece * job.piece;
    copy_run(reinterpret_cast<char*>(job.dst) + offset_of<Dst>(loops, job.rank, turn),
             reinterpret_cast<const char*>(job.src) + offset_of<Src>(loops, job.rank, turn),
             left < job.piece ? left : job.piece, warp);
  }
}
