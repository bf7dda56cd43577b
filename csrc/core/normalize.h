#pragma once

#include "core/task.h"

namespace paramkit {

// Brings the loops of a write into canonical order, in place, and returns how many are left (-1: the
// write is empty): size-1 loops dropped, the rest ordered by destination stride, outermost first, and
// neighbours merged where one continues the other on both sides. The set of (destination, source)
// element pairs stays the same.
int normalize(Dim* dims, int rank);

// Whether the destination's elements certainly lie apart, after normalize(): each loop steps over all
// that the loops inside it reach. False also for a few exotic strides that are in fact fine.
bool injective(const Dim* dims, int rank, int width);

// Sorts loops, those for which before(a, b) first; equal ones keep their order. Ranks are small, and views are
// mostly in order already.
template <class Before>
void sort_dims(Dim* dims, int rank, Before before) {
  for (int i = 1; i < rank; ++i) {
    const Dim dim = dims[i];
    int at = i;
    for (; at > 0 && before(dim, dims[at - 1]); --at) dims[at] = dims[at - 1];
    dims[at] = dim;
  }
}

}  // namespace paramkit
