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

}  // namespace paramkit
