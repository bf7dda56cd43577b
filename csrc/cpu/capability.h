#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace paramkit::cpu {

// What this machine can run, the plainest first.
const std::vector<const Kernels*>& available();

// The kernels in use: the last of available(), unless another was chosen.
const Kernels& active();

// Chooses by name; false when this machine does not have it.
bool choose(const char* name);

}  // namespace paramkit::cpu
