#include "core/normalize.h"

namespace paramkit {

namespace {

// Outer loops first: larger destination strides, then larger source strides.
bool goes_before(const Dim& a, const Dim& b) { return a.dst != b.dst ? a.dst > b.dst : a.src > b.src; }

bool continues(const Dim& outer, const Dim& inner) {
  return outer.dst == inner.dst * inner.size && outer.src == inner.src * inner.size;
}

}  // namespace

int normalize(Dim* dims, int rank) {
  int n = 0;
  for (int i = 0; i < rank; ++i) {
    if (dims[i].size == 0) return -1;
    if (dims[i].size == 1) continue;
    dims[n++] = dims[i];
  }
  sort_dims(dims, n, goes_before);
  int merged = 0;
  for (int i = 1; i < n; ++i) {
    if (continues(dims[merged], dims[i])) {
      dims[merged] = {dims[merged].size * dims[i].size, dims[i].dst, dims[i].src};
    } else {
      dims[++merged] = dims[i];
    }
  }
  return n == 0 ? 0 : merged + 1;
}

bool injective(const Dim* dims, int rank, int width) {
  int64_t reach = width;
  for (int i = rank - 1; i >= 0; --i) {
    if (dims[i].dst < reach) return false;
    reach += (dims[i].size - 1) * dims[i].dst;
  }
  return true;
}

}  // namespace paramkit
