// Basic indices, which is integers, slices, None and Ellipsis: kept as a few words, so that no Python
// object has to be held, and resolved to sizes and strides without making a view.
#pragma once

#include <Python.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <vector>

#include "core/task.h"

namespace paramkit {

// Appends the words of an index. False, and nothing appended, for anything but exact Python integers,
// slices of them with a positive step, None and one Ellipsis, or a tuple of those.
bool encode_index(PyObject* index, std::vector<int64_t>& words);

// The index again, a new reference; null with a Python error set if there is no memory for it.
PyObject* decode_index(const int64_t* words);

// Part of a tensor: sizes and strides in elements, the offset from the tensor's first element.
struct Part {
  int rank;
  int64_t offset;
  int64_t sizes[kMaxRank];
  int64_t strides[kMaxRank];
};

// The indices that a part takes of one dimension of the tensor.
struct Steps {
  int64_t first;
  int64_t step;
  int64_t count;
};

// What torch's indexing gives, and where `steps` is not null, the same as steps through each of the
// tensor's dimensions. False where torch raises, or if the part has more than kMaxRank dimensions.
bool resolve_index(const int64_t* words, c10::IntArrayRef sizes, c10::IntArrayRef strides, Part& part, Steps* steps);

// Whether two parts of a tensor of `rank` dimensions certainly have no element in common.
bool apart(const Steps* a, const Steps* b, size_t rank);

}  // namespace paramkit
