#include "torch/python_ops.h"

#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>

#include "cpu/run.h"
#include "torch/batch.h"
#include "torch/load_state_dict.h"
#include "torch/modules.h"
#include "torch/python_types.h"
#include "torch/scratch.h"
#include "torch/threads.h"

namespace paramkit {

namespace {

namespace py = pybind11;

// Where a mode, a functorch transform or a tracer is active every write has to be seen by it: the same
// function of the native backend, which calls torch's own copy_ and fill_ one by one.
PyObject* native(const char* function, PyObject* const* args, Py_ssize_t n) {
  const auto module = py::module_::import("paramkit.backend.native");
  PyObject* result = PyObject_Vectorcall(module.attr(function).ptr(), args, static_cast<size_t>(n), nullptr);
  if (result == nullptr) throw python_error();
  return result;
}

std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

// Whether looking at an entry runs no Python code: an exact tensor, or a number of Python's own.
bool is_simple(PyObject* object) {
  return THPVariable_CheckExact(object) || PyFloat_CheckExact(object) || PyLong_CheckExact(object) ||
         PyBool_Check(object) || PyComplex_CheckExact(object);
}

// A list or tuple of the caller's. Where parsing an entry may run Python code, which may change the
// list, its entries are held.
struct Items {
  PyObject** data;
  Py_ssize_t size;
  py::object held;

  Items(PyObject* sequence, const char* op, const char* name) {
    TORCH_CHECK_TYPE(PyList_Check(sequence) || PyTuple_Check(sequence), op, ": expected a list or tuple of tensors as ",
                     name, ", got ", type_name(sequence));
    set(sequence);
  }

  void hold() {
    if (held) return;
    PyObject* copy = new_tuple(size);
    held = py::reinterpret_steal<py::object>(copy);
    for (Py_ssize_t i = 0; i < size; ++i) PyTuple_SET_ITEM(copy, i, Py_NewRef(data[i]));
    set(copy);
  }

 private:
  void set(PyObject* sequence) {
    data = PySequence_Fast_ITEMS(sequence);
    size = PySequence_Fast_GET_SIZE(sequence);
  }
};

// Before entry i is looked at: that may run code which changes either list.
inline void hold_unless_simple(Items& first, Items& second, Py_ssize_t i, Py_ssize_t j) {
  if (is_simple(first.data[i]) && is_simple(second.data[j])) return;
  first.hold();
  second.hold();
}

at::TensorImpl* exact_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ? THPVariable_Unpack(object).unsafeGetTensorImpl() : nullptr;
}

// The tensor of an entry, or null; those a few places on are fetched, in the order in which they point to
// one another.
at::TensorImpl* fetch_ahead(const Items& items, size_t i) {
  constexpr size_t kStep = 8;
  const auto n = static_cast<size_t>(items.size);
  if (i + 3 * kStep < n) __builtin_prefetch(items.data[i + 3 * kStep]);
  if (i + 2 * kStep < n) {
    if (const auto* tensor = exact_tensor(items.data[i + 2 * kStep])) prefetch(tensor);
  }
  if (i + kStep < n) {
    const auto* tensor = exact_tensor(items.data[i + kStep]);
    if (tensor != nullptr && tensor->unsafe_storage()) prefetch(tensor->unsafe_storage().unsafeGetStorageImpl());
  }
  return exact_tensor(items.data[i]);
}

// Whether a list is worth several threads before anything is copied: it is long, or by a few of its entries
// so large that the copy will need them anyway.
bool several_threads(const Items& dsts) {
  const auto n = static_cast<size_t>(dsts.size);
  if (n > kLongList) return true;
  constexpr size_t kFew = 16, kLeast = 256;
  if (n < kLeast) return false;
  size_t bytes = 0;
  for (size_t i = 0; i < kFew; ++i) {
    const at::TensorImpl* impl = exact_tensor(dsts.data[i * n / kFew + i]);
    if (impl != nullptr && access(*impl) == Access::Plain)
      bytes += static_cast<size_t>(impl->numel()) * impl->itemsize();
  }
  return bytes / kFew * n >= static_cast<size_t>(cpu::kParallelBytes) * 3 / 2;
}

bool is_tensor(PyObject* object) { return THPVariable_CheckExact(object) || THPVariable_Check(object); }

const at::Tensor& tensor(PyObject* object, const char* op, const char* list, const char* single, int64_t index) {
  if (!is_tensor(object)) {
    const std::string place = index < 0 ? single : std::string(list) + "[" + std::to_string(index) + "]";
    TORCH_CHECK_TYPE(false, op, ": expected a Tensor as ", place, ", got ", type_name(object));
  }
  return THPVariable_Unpack(object);
}

// A subclass may have a __torch_function__ of its own: Python's method, not the dispatcher's.
void defer_method(Batch& batch, PyObject* dst, const char* method, PyObject* argument) {
  const bool copies = std::strcmp(method, "copy_") == 0;
  batch.defer([d = py::reinterpret_borrow<py::object>(dst), a = py::reinterpret_borrow<py::object>(argument), method,
               copies](bool non_blocking) { copies ? d.attr(method)(a, non_blocking) : d.attr(method)(a); });
}

void add_copy(Batch& batch, Batch::Place place, PyObject* dst, PyObject* src) {
  const at::Tensor& to = tensor(dst, place.op, "dsts", "dst", place.index);
  const at::Tensor& from = tensor(src, place.op, "srcs", "src", place.index);
  if (THPVariable_CheckExact(dst) && THPVariable_CheckExact(src)) return batch.copy(place, to, from);
  batch.check_native(place, to, from);
  defer_method(batch, dst, "copy_", src);
}

// What torch takes as a number: Python's own, and numpy's scalars. False for anything else.
bool to_scalar(PyObject* object, c10::Scalar& scalar) {
  if (PyBool_Check(object)) {
    scalar = object == Py_True;
  } else if (PyFloat_Check(object)) {
    scalar = PyFloat_AS_DOUBLE(object);
  } else if (PyComplex_Check(object)) {
    const Py_complex value = PyComplex_AsCComplex(object);
    scalar = c10::complex<double>(value.real, value.imag);
  } else if (PyLong_Check(object)) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    scalar = static_cast<int64_t>(value);
    if (overflow != 0) {
      const unsigned long long large = overflow > 0 ? PyLong_AsUnsignedLongLong(object) : 0;
      if (overflow < 0) (void)PyLong_AsLongLong(object);  // Python's own OverflowError
      if (PyErr_Occurred() != nullptr) throw python_error();
      scalar = static_cast<uint64_t>(large);
    }
  } else if (PyIndex_Check(object)) {
    const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(object));
    if (!integer) throw python_error();
    return to_scalar(integer.ptr(), scalar);
  } else if (type_name(object).rfind("numpy.", 0) == 0 && PyNumber_Check(object) != 0) {
    const Py_complex value = PyComplex_AsCComplex(object);
    if (PyErr_Occurred() != nullptr) throw python_error();
    if (value.imag == 0) {
      scalar = value.real;
    } else {
      scalar = c10::complex<double>(value.real, value.imag);
    }
  } else {
    return false;
  }
  return true;
}

// `number` is what `seen`, the value of the entry before, was converted to: often the same object.
void add_fill(Batch& batch, Batch::Place place, PyObject* dst, PyObject* value, PyObject*& seen,
              Batch::Number& number) {
  const at::Tensor& to = tensor(dst, place.op, "dsts", "dst", place.index);
  if (is_tensor(value)) {
    if (!THPVariable_CheckExact(dst) || !THPVariable_CheckExact(value)) {
      batch.check_native_fill(place, to, THPVariable_Unpack(value));
      return defer_method(batch, dst, "fill_", value);
    }
    return batch.fill(place, to, THPVariable_Unpack(value));
  }
  if (value != seen) {
    number = {};
    if (!to_scalar(value, number.value)) {
      TORCH_CHECK_TYPE(false, place.op, ": expected a number or a 0-dim tensor as ",
                       place.index < 0 ? std::string("value") : "values[" + std::to_string(place.index) + "]", ", got ",
                       type_name(value));
    }
    seen = value;
  }
  if (!THPVariable_CheckExact(dst)) {
    batch.check_native(place, to, number.value);
    return defer_method(batch, dst, "fill_", value);
  }
  batch.fill(place, to, number);
}

void check_arguments(const char* op, Py_ssize_t got, Py_ssize_t expected) {
  TORCH_CHECK_TYPE(got == expected, op, ": expected ", expected, " arguments, got ", got);
}

bool truth(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw python_error();
  return value != 0;
}

PyObject* copy_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  check_arguments("copy_", n, 3);
  if (!plain_context()) return native("copy_", args, n);
  const bool non_blocking = truth(args[2]);
  const Scratch batch;
  add_copy(*batch, {"copy_", -1}, args[0], args[1]);
  RECORD_FUNCTION("paramkit::copy_", std::vector<c10::IValue>());
  batch->run(non_blocking);
  return Py_NewRef(args[0]);
  END_HANDLE_TH_ERRORS
}

PyObject* fill_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  check_arguments("fill_", n, 2);
  if (!plain_context()) return native("fill_", args, n);
  const Scratch batch;
  PyObject* seen = nullptr;
  Batch::Number number;
  add_fill(*batch, {"fill_", -1}, args[0], args[1], seen, number);
  RECORD_FUNCTION("paramkit::fill_", std::vector<c10::IValue>());
  batch->run(false);
  return Py_NewRef(args[0]);
  END_HANDLE_TH_ERRORS
}

PyObject* foreach_copy_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  constexpr const char* op = "foreach_copy_";
  check_arguments(op, n, 3);
  if (!plain_context()) return native(op, args, n);
  const bool non_blocking = truth(args[2]);
  Items dsts(args[0], op, "dsts"), srcs(args[1], op, "srcs");
  TORCH_CHECK(dsts.size > 0 || srcs.size > 0, op, ": Tensor list must have at least one tensor.");
  TORCH_CHECK(dsts.size == srcs.size, op, ": Tensor lists must have the same number of tensors, got ", dsts.size,
              " dsts and ", srcs.size, " srcs");
  const Scratch batch;
  const auto n = static_cast<size_t>(dsts.size);
  const size_t pieces = several_threads(dsts) ? static_cast<size_t>(threads()) : 1;
  const auto copy_plain = [&](size_t first) {
    const auto entries = [&](const Items& items) {
      return [&items, first](size_t i) { return exact_tensor(items.data[first + i]); };
    };
    const auto far_entries = [&](const Items& items) {
      return [&items, first](size_t i) { return fetch_ahead(items, first + i); };
    };
    return n > kLongList ? batch->copy_plain(n - first, pieces, far_entries(dsts), far_entries(srcs))
                         : batch->copy_plain(n - first, pieces, entries(dsts), entries(srcs));
  };
  // A few that are not plain, such as empty ones, or the first of its dtypes, do not slow down the rest.
  constexpr int kTries = 4;
  int tries = 0;
  for (size_t done = 0; done < n; ++done) {
    if (tries++ < kTries) done += copy_plain(done);
    if (done == n) break;
    const auto i = static_cast<Py_ssize_t>(done);
    hold_unless_simple(dsts, srcs, i, i);
    add_copy(*batch, {op, i}, dsts.data[i], srcs.data[i]);
  }
  RECORD_FUNCTION("paramkit::foreach_copy_", std::vector<c10::IValue>());
  if (batch->runs_python()) {
    dsts.hold();
    srcs.hold();
  }
  batch->run(non_blocking);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* foreach_fill_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  constexpr const char* op = "foreach_fill_";
  check_arguments(op, n, 2);
  if (!plain_context()) return native(op, args, n);
  Items dsts(args[0], op, "dsts");
  // One value for all is a list that repeats it.
  const bool one = !(PyList_Check(args[1]) || PyTuple_Check(args[1]));
  const auto single = py::make_tuple(py::reinterpret_borrow<py::object>(args[1]));
  Items values(one ? single.ptr() : args[1], op, "values");
  const Py_ssize_t count = one ? dsts.size : values.size;
  TORCH_CHECK(dsts.size > 0 || count > 0, op, ": Tensor list must have at least one tensor.");
  TORCH_CHECK(dsts.size == count, op, ": expected one value, or one value a tensor: got ", dsts.size, " dsts and ",
              count, " values");
  const Scratch batch;
  PyObject* seen = nullptr;
  Batch::Number number;
  for (Py_ssize_t i = 0; i < dsts.size; ++i) {
    hold_unless_simple(dsts, values, i, one ? 0 : i);
    add_fill(*batch, {op, i}, dsts.data[i], values.data[one ? 0 : i], seen, number);
  }
  RECORD_FUNCTION("paramkit::foreach_fill_", std::vector<c10::IValue>());
  if (batch->runs_python()) {
    dsts.hold();
    values.hold();
  }
  batch->run(false);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* load_state_dict_(PyObject*, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  check_arguments("load_state_dict", n, 3);
  if (plain_context() && load_state_dict(args[0], args[1], args[2] == Py_True)) Py_RETURN_TRUE;
  Py_RETURN_FALSE;
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name, const char* doc) {
  return {name, fast_call<function>(), METH_FASTCALL, doc};
}

}  // namespace

PyMethodDef kOperators[] = {
    method<copy_>("copy_", "copy_(dst, src, non_blocking)"),
    method<fill_>("fill_", "fill_(dst, value)"),
    method<foreach_copy_>("foreach_copy_", "foreach_copy_(dsts, srcs, non_blocking)"),
    method<foreach_fill_>("foreach_fill_", "foreach_fill_(dsts, values)"),
    method<load_state_dict_>("load_state_dict", "load_state_dict(model, state_dict, waits) -> whether it could"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace paramkit
