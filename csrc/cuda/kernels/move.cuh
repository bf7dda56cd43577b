// Loads, stores and addresses.

// A place in a tensor, which is device memory, or host memory that the device reaches: not shared memory, and
// not the arguments. Said to the compiler, so that it uses the instructions for that.
template <class T>
PARAMKIT_FN T* place(char* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return reinterpret_cast<T*>(p);
}
template <class T>
PARAMKIT_FN const T* place(const char* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return reinterpret_cast<const T*>(p);
}

// N loads of `width` bytes each. All are asked for before any is waited for.
template <int N>
PARAMKIT_FN void load(Raw (&r)[N], const char* const (&p)[N], uint32_t width) {
  switch (width) {
    case 16:
#pragma unroll
      for (int i = 0; i < N; ++i) r[i] = *place<Raw>(p[i]);
      return;
    case 8:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Raw8 half = *place<Raw8>(p[i]);
        r[i].w[0] = half.w[0];
        r[i].w[1] = half.w[1];
      }
      return;
    case 4:
#pragma unroll
      for (int i = 0; i < N; ++i) r[i].w[0] = *place<uint32_t>(p[i]);
      return;
    case 2:
#pragma unroll
      for (int i = 0; i < N; ++i) r[i].w[0] = *place<uint16_t>(p[i]);
      return;
    default:
#pragma unroll
      for (int i = 0; i < N; ++i) r[i].w[0] = *place<uint8_t>(p[i]);
  }
}

PARAMKIT_FN Raw load_one(const char* p, uint32_t width) {
  Raw r[1] = {};
  const char* const address[1] = {p};
  load<1>(r, address, width);
  return r[0];
}

PARAMKIT_FN void store(char* p, const Raw& r, uint32_t width) {
  switch (width) {
    case 16: *place<Raw>(p) = r; return;
    case 8: *place<Raw8>(p) = {{r.w[0], r.w[1]}}; return;
    case 4: *place<uint32_t>(p) = r.w[0]; return;
    case 2: *place<uint16_t>(p) = static_cast<uint16_t>(r.w[0]); return;
    default: *place<uint8_t>(p) = static_cast<uint8_t>(r.w[0]);
  }
}

// The first `width` bytes (1, 2, 4, 8 or 16), over and over.
PARAMKIT_FN Raw repeated(Raw r, uint32_t width) {
  if (width == 1) r.w[0] = (r.w[0] & 0xff) * 0x01010101U;
  if (width == 2) r.w[0] = (r.w[0] & 0xffff) * 0x00010001U;
  if (width <= 4) r.w[1] = r.w[0];
  if (width <= 8) r.w[2] = r.w[0], r.w[3] = r.w[1];
  return r;
}

PARAMKIT_FN uint32_t high_half(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

PARAMKIT_FN uint32_t divide(uint32_t n, const Divisor& by) { return (high_half(n, by.magic) + n) >> by.shift; }

// One side of a write: Dst or Src.
struct Dst {
  static PARAMKIT_FN int64_t of(const Loop& loop) { return loop.dst; }
};
struct Src {
  static PARAMKIT_FN int64_t of(const Loop& loop) { return loop.src; }
};

// The offset on one side of turn number `turn`, below 2**31, of all loops together. One side at a time: both
// at once would be half the divisions, and the registers of twice as many addresses.
template <class Side>
PARAMKIT_FN int64_t offset_of(const Loop* loops, uint32_t rank, uint32_t turn) {
  int64_t offset = 0;
  for (uint32_t d = 0; d + 1 < rank; ++d) {
    const uint32_t outer = divide(turn, loops[d].by);
    offset += (turn - outer * loops[d].by.size) * Side::of(loops[d]);
    turn = outer;
  }
  return offset + turn * Side::of(loops[rank - 1]);
}

// The share of part `part` of `parts` in [0, n): whole multiples of `unit`, but for the end.
struct Share {
  uint64_t begin, end;
};
PARAMKIT_FN Share share_of(uint64_t n, uint32_t part, uint32_t parts, uint32_t unit) {
  if (parts == 1) return {0, n};
  const uint64_t each = ((n + parts - 1) / parts + unit - 1) / unit * unit;
  const uint64_t begin = each * part < n ? each * part : n;
  return {begin, n - begin < each ? n : begin + each};
}
