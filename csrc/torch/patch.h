#pragma once

#include <cstddef>

namespace paramkit {

// Whether torch's own copy_, fill_ and _foreach_copy_ take the kernels for CPU tensors, in the whole
// process. The first `true` adds kernels to torch's dispatcher, which stay there: its tables may not be
// changed while other threads read them. From then on they ask this flag, and without it do what torch did.
// Throws c10::Error if another library has put kernels of its own there.
void patch_torch(bool on);

// For tests: from how many bytes on copy_ and fill_ take them. Returns what it was.
size_t set_patch_least_bytes(size_t bytes);

}  // namespace paramkit
