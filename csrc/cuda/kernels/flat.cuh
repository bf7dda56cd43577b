// Groups of elements in any loops: strided moves, casts, fills. Neighbouring threads take neighbouring
// groups, so that where the innermost loop is dense a warp moves a run of memory.

PARAMKIT_FN const char* source_of(const FlatJob& job, uint32_t i) {
  return reinterpret_cast<const char*>(job.src) + offset_of<Src>(reinterpret_cast<const Loop*>(&job + 1), job.rank, i);
}
PARAMKIT_FN char* destination_of(const FlatJob& job, uint32_t i) {
  return reinterpret_cast<char*>(job.dst) + offset_of<Dst>(reinterpret_cast<const Loop*>(&job + 1), job.rank, i);
}

PARAMKIT_FN void run_fill(const FlatJob& job, Group group, uint32_t part, uint32_t parts) {
  Raw value;
  memcpy(&value, job.value, 16);
  const uint32_t width = job.store / job.elements;
  const Share share = share_of(job.n, part, parts, kWarp);
  for (uint32_t i = static_cast<uint32_t>(share.begin) + group.rank; i < share.end; i += group.size) {
    store(destination_of(job, i), value, job.store);
  }
  char* const dst = reinterpret_cast<char*>(job.dst);
  if (part == 0 && group.rank < job.head) store(dst - uint64_t{job.head - group.rank} * width, value, width);
  if (part + 1 == parts && group.rank < job.tail) {
    store(dst + uint64_t{job.n} * job.store + uint64_t{group.rank} * width, value, width);
  }
}

PARAMKIT_FN void run_moves(const FlatJob& job, Group group, uint32_t part, uint32_t parts) {
  const Share share = share_of(job.n, part, parts, kWarp);
  const auto end = static_cast<uint32_t>(share.end);
  const uint32_t width = job.store;
  for (uint32_t i = static_cast<uint32_t>(share.begin) + group.rank; i < end; i += kUnroll * group.size) {
    const char* src[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t at = i + u * group.size;
      src[u] = source_of(job, at < end ? at : end - 1);  // what is loaded twice is not stored twice
    }
    Raw r[kUnroll] = {};
    load<kUnroll>(r, src, width);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t at = i + u * group.size;
      if (at < end) store(destination_of(job, at), r[u], width);
    }
  }
}

// Groups of E elements; or, with E = 1, one element of the source for a whole group. The next group is loaded
// before this one is converted.
template <int E>
PARAMKIT_FN void cast_groups(const FlatJob& job, Group group, uint32_t begin, uint32_t end, bool saturates) {
  uint32_t i = begin + group.rank;
  if (i >= end) return;
  Raw r = load_one(source_of(job, i), job.load);
  while (true) {
    const uint32_t next = i + group.size;
    const Raw r_next = load_one(source_of(job, next < end ? next : i), job.load);
    if (job.to != job.from) r = convert<E>(job.to, job.from, r, saturates);
    store(destination_of(job, i), job.repeat == 0 ? r : repeated(r, job.repeat), job.store);
    if (next >= end) return;
    i = next, r = r_next;
  }
}

// Elements by themselves: what is left of a run on either side of its groups.
PARAMKIT_FN void cast_ends(const FlatJob& job, Group group, bool first, bool last, bool saturates) {
  const uint32_t elements = job.elements, width = job.store / elements;
  const uint32_t src_width = job.repeat != 0 ? job.load : job.load / elements;
  const uint32_t src_step = job.repeat != 0 ? 0 : src_width;
  const int64_t end = int64_t{job.n} * elements;
  // Head and tail are shorter than a warp: a thread has at most one of each.
  for (int side = 0; side < 2; ++side) {
    const uint32_t n = side == 0 ? (first ? job.head : 0) : (last ? job.tail : 0);
    if (group.rank >= n) continue;
    const int64_t at = side == 0 ? int64_t{group.rank} - n : end + group.rank;
    Raw r = load_one(reinterpret_cast<const char*>(job.src) + at * src_step, src_width);
    if (job.to != job.from) r = convert<1>(job.to, job.from, r, saturates);
    store(reinterpret_cast<char*>(job.dst) + at * width, r, width);
  }
}

PARAMKIT_FN void run_casts(const FlatJob& job, Group group, uint32_t part, uint32_t parts, bool saturates) {
  const Share share = share_of(job.n, part, parts, kWarp);
  const auto begin = static_cast<uint32_t>(share.begin), end = static_cast<uint32_t>(share.end);
  switch (job.repeat != 0 ? 1 : job.elements) {
    case 8: cast_groups<8>(job, group, begin, end, saturates); break;
    case 4: cast_groups<4>(job, group, begin, end, saturates); break;
    case 2: cast_groups<2>(job, group, begin, end, saturates); break;
    default: cast_groups<1>(job, group, begin, end, saturates);
  }
  if (job.head + job.tail != 0) cast_ends(job, group, part == 0, part + 1 == parts, saturates);
}
