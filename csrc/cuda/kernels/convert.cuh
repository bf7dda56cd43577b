// Casts in registers: a group of elements goes through float, double or a 64-bit integer, whichever holds
// every value of the source. Two switches for a group of up to eight elements, not a loop for each of 306
// pairs of types: the code stays small. By their count of instructions the memory should be slower.

enum class Via : uint8_t { Float, Double, Int, UInt };

PARAMKIT_FN Via via(Type from) {
  switch (from) {
    case Type::Float64: return Via::Double;
    case Type::UInt64: return Via::UInt;
    case Type::Int8:
    case Type::Int16:
    case Type::Int32:
    case Type::Int64:
    case Type::UInt8:
    case Type::UInt16:
    case Type::UInt32:
    case Type::Bool: return Via::Int;
    default: return Via::Float;
  }
}

// Element i of W bytes.
template <int W>
PARAMKIT_FN uint64_t get(const Raw& r, int i) {
  if constexpr (W == 8) return r.w[2 * i] | uint64_t{r.w[2 * i + 1]} << 32;
  if constexpr (W == 4) return r.w[i];
  return r.w[i * W / 4] >> (i * W % 4 * 8) & (W == 2 ? 0xffffU : 0xffU);
}

// The same into a register of zeros.
template <int W>
PARAMKIT_FN void put(Raw& r, int i, uint64_t bits) {
  if constexpr (W == 8) {
    r.w[2 * i] = static_cast<uint32_t>(bits);
    r.w[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
  } else if constexpr (W == 4) {
    r.w[i] = static_cast<uint32_t>(bits);
  } else {
    r.w[i * W / 4] |= static_cast<uint32_t>(bits) << (i * W % 4 * 8);
  }
}

template <class F>
PARAMKIT_FN float up(uint64_t bits) {
  return F::up(static_cast<typename F::Bits>(bits));
}
template <class F>
PARAMKIT_FN uint64_t down(float x, uint32_t beyond) {
  return F::down(x, beyond);
}
#if defined(__CUDA_ARCH__)
// The machine's own instructions where it has them, with the same values.
template <>
PARAMKIT_FN float up<Half>(uint64_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
template <>
PARAMKIT_FN uint64_t down<Half>(float x, uint32_t) {
  return __half_as_ushort(__float2half_rn(x));
}
template <>
PARAMKIT_FN uint64_t down<Brain>(float x, uint32_t) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
#endif

template <class T, class I>
PARAMKIT_FN uint64_t bits_as(I x) {
  const T value = value_as<T>(x);
  if constexpr (sizeof(T) == 8) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
  } else if constexpr (std::is_same_v<T, float>) {
    return bits_of(value);
  } else {
    return static_cast<std::make_unsigned_t<T>>(value);
  }
}

// E elements at most, those that fit; `each` does one.
#define PARAMKIT_ELEMENTS(W, statement)                          \
  if constexpr (E * (W) <= 16) {                                 \
    _Pragma("unroll") for (int i = 0; i < E; ++i) { statement; } \
  }                                                              \
  break

template <int E>
PARAMKIT_FN void expand(Type from, const Raw& r, float (&x)[E]) {
  switch (from) {
    case Type::Float32: PARAMKIT_ELEMENTS(4, x[i] = float_of(static_cast<uint32_t>(get<4>(r, i))));
    case Type::Float16: PARAMKIT_ELEMENTS(2, x[i] = up<Half>(get<2>(r, i)));
    case Type::BFloat16: PARAMKIT_ELEMENTS(2, x[i] = up<Brain>(get<2>(r, i)));
    case Type::Float8E4M3FN: PARAMKIT_ELEMENTS(1, x[i] = up<E4M3FN>(get<1>(r, i)));
    case Type::Float8E4M3FNUZ: PARAMKIT_ELEMENTS(1, x[i] = up<E4M3FNUZ>(get<1>(r, i)));
    case Type::Float8E5M2: PARAMKIT_ELEMENTS(1, x[i] = up<E5M2>(get<1>(r, i)));
    case Type::Float8E5M2FNUZ: PARAMKIT_ELEMENTS(1, x[i] = up<E5M2FNUZ>(get<1>(r, i)));
    default: PARAMKIT_ELEMENTS(1, x[i] = up<E8M0FNU>(get<1>(r, i)));
  }
}

template <int E>
PARAMKIT_FN void expand(Type from, const Raw& r, int64_t (&x)[E]) {
  switch (from) {
    case Type::Int8: PARAMKIT_ELEMENTS(1, x[i] = static_cast<int8_t>(get<1>(r, i)));
    case Type::Int16: PARAMKIT_ELEMENTS(2, x[i] = static_cast<int16_t>(get<2>(r, i)));
    case Type::Int32: PARAMKIT_ELEMENTS(4, x[i] = static_cast<int32_t>(get<4>(r, i)));
    case Type::Int64: PARAMKIT_ELEMENTS(8, x[i] = static_cast<int64_t>(get<8>(r, i)));
    case Type::UInt16: PARAMKIT_ELEMENTS(2, x[i] = static_cast<int64_t>(get<2>(r, i)));
    case Type::UInt32: PARAMKIT_ELEMENTS(4, x[i] = static_cast<int64_t>(get<4>(r, i)));
    case Type::Bool: PARAMKIT_ELEMENTS(1, x[i] = get<1>(r, i) != 0 ? 1 : 0);  // any byte but 0 is true
    default: PARAMKIT_ELEMENTS(1, x[i] = static_cast<int64_t>(get<1>(r, i)));
  }
}

template <int E>
PARAMKIT_FN void expand(Type, const Raw& r, double (&x)[E]) {
#pragma unroll
  for (int i = 0; i < E; ++i) {
    const uint64_t bits = get<8>(r, i);
    memcpy(&x[i], &bits, 8);
  }
}

template <int E>
PARAMKIT_FN void expand(Type, const Raw& r, uint64_t (&x)[E]) {
#pragma unroll
  for (int i = 0; i < E; ++i) x[i] = get<8>(r, i);
}

template <int E, class I>
PARAMKIT_FN Raw narrow(Type to, const I (&x)[E], bool saturates) {
  Raw r = {};
  switch (to) {
    case Type::Float64: PARAMKIT_ELEMENTS(8, put<8>(r, i, bits_as<double>(x[i])));
    case Type::Float32: PARAMKIT_ELEMENTS(4, put<4>(r, i, bits_as<float>(x[i])));
    case Type::Float16: PARAMKIT_ELEMENTS(2, put<2>(r, i, down<Half>(static_cast<float>(x[i]), 0x7c00)));
    case Type::BFloat16: PARAMKIT_ELEMENTS(2, put<2>(r, i, down<Brain>(static_cast<float>(x[i]), 0)));
    case Type::Float8E4M3FN:
      PARAMKIT_ELEMENTS(1, put<1>(r, i, down<E4M3FN>(static_cast<float>(x[i]), saturates ? 0x7e : 0x7f)));
    case Type::Float8E4M3FNUZ: PARAMKIT_ELEMENTS(1, put<1>(r, i, down<E4M3FNUZ>(static_cast<float>(x[i]), 0x80)));
    case Type::Float8E5M2: PARAMKIT_ELEMENTS(1, put<1>(r, i, down<E5M2>(static_cast<float>(x[i]), 0x7c)));
    case Type::Float8E5M2FNUZ: PARAMKIT_ELEMENTS(1, put<1>(r, i, down<E5M2FNUZ>(static_cast<float>(x[i]), 0x80)));
    case Type::Float8E8M0FNU: PARAMKIT_ELEMENTS(1, put<1>(r, i, down<E8M0FNU>(static_cast<float>(x[i]), 0)));
    case Type::Int8: PARAMKIT_ELEMENTS(1, put<1>(r, i, bits_as<int8_t>(x[i])));
    case Type::Int16: PARAMKIT_ELEMENTS(2, put<2>(r, i, bits_as<int16_t>(x[i])));
    case Type::Int32: PARAMKIT_ELEMENTS(4, put<4>(r, i, bits_as<int32_t>(x[i])));
    case Type::Int64: PARAMKIT_ELEMENTS(8, put<8>(r, i, bits_as<int64_t>(x[i])));
    case Type::UInt8: PARAMKIT_ELEMENTS(1, put<1>(r, i, bits_as<uint8_t>(x[i])));
    case Type::UInt16: PARAMKIT_ELEMENTS(2, put<2>(r, i, bits_as<uint16_t>(x[i])));
    case Type::UInt32: PARAMKIT_ELEMENTS(4, put<4>(r, i, bits_as<uint32_t>(x[i])));
    case Type::UInt64: PARAMKIT_ELEMENTS(8, put<8>(r, i, bits_as<uint64_t>(x[i])));
    default: PARAMKIT_ELEMENTS(1, put<1>(r, i, x[i] != I{0}));  // bool; NaN is true
  }
  return r;
}
#undef PARAMKIT_ELEMENTS

template <int E, class I>
PARAMKIT_FN Raw through(Type to, Type from, const Raw& r, bool saturates) {
  I x[E];
  expand<E>(from, r, x);
  return narrow<E>(to, x, saturates);
}

// E elements. Groups of more than two are of 64-bit values never, of eight not of integers: see elements_of()
// in cuda/pack.cpp.
template <int E>
PARAMKIT_FN Raw convert(Type to, Type from, const Raw& r, bool saturates) {
  if constexpr (E == 8) {
    return through<E, float>(to, from, r, saturates);
  } else {
    switch (via(from)) {
      case Via::Float: return through<E, float>(to, from, r, saturates);
      case Via::Int: return through<E, int64_t>(to, from, r, saturates);
      default: break;
    }
    if constexpr (E <= 2) {
      if (via(from) == Via::Double) return through<E, double>(to, from, r, saturates);
      return through<E, uint64_t>(to, from, r, saturates);
    } else {
      return r;
    }
  }
}
