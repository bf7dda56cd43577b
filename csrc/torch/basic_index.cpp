#include "torch/basic_index.h"

#include <algorithm>
#include <numeric>

namespace paramkit {

namespace {

// The first word of an index holds the number of its items and whether they came as a tuple. Each item
// has a word that says what it is, followed by an integer, or by those parts of a slice that are not None.
constexpr int64_t kTuple = 1 << 16;
enum : int64_t { kInteger = 0, kSlice = 1, kNone = 2, kEllipsis = 3, kKind = 3, kStart = 4, kStop = 8, kStep = 16 };

bool integer(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool add_part(PyObject* part, int64_t flag, size_t header, std::vector<int64_t>& words) {
  if (part == Py_None) return true;
  int64_t value = 0;
  if (!integer(part, value) || (flag == kStep && value <= 0)) return false;
  words[header] |= flag;
  words.push_back(value);
  return true;
}

bool add_item(PyObject* item, std::vector<int64_t>& words, int& ellipses) {
  if (PySlice_Check(item)) {
    const auto* slice = reinterpret_cast<PySliceObject*>(item);
    const size_t header = words.size();
    words.push_back(kSlice);
    return add_part(slice->start, kStart, header, words) && add_part(slice->stop, kStop, header, words) &&
           add_part(slice->step, kStep, header, words);
  }
  int64_t value = 0;
  if (integer(item, value)) {
    words.push_back(kInteger);
    words.push_back(value);
    return true;
  }
  if (item == Py_Ellipsis) {
    words.push_back(kEllipsis);
    return ++ellipses == 1;
  }
  words.push_back(kNone);
  return item == Py_None;
}

bool add_items(PyObject* index, std::vector<int64_t>& words) {
  int ellipses = 0;
  const size_t header = words.size();
  words.push_back(1);
  if (!PyTuple_CheckExact(index)) return add_item(index, words, ellipses);
  const Py_ssize_t n = PyTuple_GET_SIZE(index);
  if (n > kMaxRank) return false;
  words[header] = n | kTuple;
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (!add_item(PyTuple_GET_ITEM(index, i), words, ellipses)) return false;
  }
  return true;
}

// Skips an item and its parts.
const int64_t* next(const int64_t* item) {
  const int64_t kind = *item & kKind;
  if (kind == kInteger) return item + 2;
  if (kind != kSlice) return item + 1;
  return item + 1 + ((*item & kStart) != 0) + ((*item & kStop) != 0) + ((*item & kStep) != 0);
}

PyObject* decode_item(const int64_t* item) {
  switch (*item & kKind) {
    case kInteger: return PyLong_FromLongLong(item[1]);
    case kNone: return Py_NewRef(Py_None);
    case kEllipsis: return Py_NewRef(Py_Ellipsis);
    default: break;
  }
  PyObject* parts[3] = {nullptr, nullptr, nullptr};
  const int64_t* value = item + 1;
  PyObject* slice = nullptr;
  bool made = true;
  for (int i = 0; i < 3; ++i) {
    if ((*item & (kStart << i)) == 0) continue;
    parts[i] = PyLong_FromLongLong(*value++);
    made = made && parts[i] != nullptr;
  }
  if (made) slice = PySlice_New(parts[0], parts[1], parts[2]);
  for (PyObject* part : parts) Py_XDECREF(part);
  return slice;
}

}  // namespace

bool encode_index(PyObject* index, std::vector<int64_t>& words) {
  const size_t before = words.size();
  if (add_items(index, words)) return true;
  words.resize(before);
  return false;
}

PyObject* decode_index(const int64_t* words) {
  const int64_t n = *words & ~kTuple;
  const int64_t* item = words + 1;
  if ((*words & kTuple) == 0) return decode_item(item);
  PyObject* index = PyTuple_New(static_cast<Py_ssize_t>(n));
  for (int64_t i = 0; index != nullptr && i < n; ++i, item = next(item)) {
    PyObject* decoded = decode_item(item);
    if (decoded == nullptr) Py_CLEAR(index);
    if (index != nullptr) PyTuple_SET_ITEM(index, static_cast<Py_ssize_t>(i), decoded);
  }
  return index;
}

bool resolve_index(const int64_t* words, c10::IntArrayRef sizes, c10::IntArrayRef strides, Part& part, Steps* steps) {
  const int64_t n = *words & ~kTuple;
  const auto dims = static_cast<int64_t>(sizes.size());
  int64_t named = 0;
  const int64_t* item = words + 1;
  for (int64_t i = 0; i < n; ++i, item = next(item)) named += (*item & kKind) <= kSlice;
  if (named > dims || dims + n > kMaxRank) return false;

  part.rank = 0;
  part.offset = 0;
  size_t dim = 0;
  const auto keep = [&](int64_t size, int64_t stride) {
    part.sizes[part.rank] = size;
    part.strides[part.rank++] = stride;
  };
  const auto take = [&](int64_t first, int64_t step, int64_t count) {
    if (steps != nullptr) steps[dim] = {first, step, count};
    part.offset += first * strides[dim++];
  };
  const auto whole = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      keep(sizes[dim], strides[dim]);
      take(0, 1, sizes[dim]);
    }
  };
  item = words + 1;
  for (int64_t i = 0; i < n; ++i, item = next(item)) {
    switch (*item & kKind) {
      case kNone: keep(1, 0); break;
      case kEllipsis: whole(dims - named); break;
      case kInteger: {
        const int64_t size = sizes[dim], at = item[1] < 0 ? item[1] + size : item[1];
        if (at < 0 || at >= size) return false;
        take(at, 1, 1);
        break;
      }
      default: {
        const int64_t size = sizes[dim];
        const int64_t* value = item + 1;
        const auto bound = [&](int64_t flag, int64_t otherwise) {
          if ((*item & flag) == 0) return otherwise;
          const int64_t at = *value++;
          return std::clamp<int64_t>(at < 0 ? at + size : at, 0, size);
        };
        const int64_t first = bound(kStart, 0), last = std::max(bound(kStop, size), first);
        const int64_t step = (*item & kStep) != 0 ? *value : 1;
        const int64_t count = last > first ? 1 + (last - first - 1) / step : 0;
        keep(count, count > 1 ? strides[dim] * step : strides[dim]);
        take(first, step, count);
      }
    }
  }
  whole(dims - static_cast<int64_t>(dim));
  return true;
}

namespace {

bool contains(const Steps& steps, int64_t at) {
  return at >= steps.first && (at - steps.first) % steps.step == 0 && (at - steps.first) / steps.step < steps.count;
}

bool apart(const Steps& a, const Steps& b) {
  if ((a.first - b.first) % std::gcd(a.step, b.step) != 0) return true;
  const Steps& few = a.count < b.count ? a : b;
  const Steps& many = a.count < b.count ? b : a;
  constexpr int64_t kMost = 256;  // beyond that somebody else may find out
  if (few.count > kMost)
    return few.step == 1 && many.step == 1 && (a.first >= b.first + b.count || b.first >= a.first + a.count);
  for (int64_t i = 0; i < few.count; ++i) {
    if (contains(many, few.first + i * few.step)) return false;
  }
  return true;
}

}  // namespace

bool apart(const Steps* a, const Steps* b, size_t rank) {
  for (size_t i = 0; i < rank; ++i) {
    if (apart(a[i], b[i])) return true;
  }
  return false;
}

}  // namespace paramkit
