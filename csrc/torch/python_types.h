// Plain Python types, for objects that are made too often for pybind11, or where no memory must leave nothing behind.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

namespace paramkit {

template <class Function>
void* slot(Function* function) {
  return reinterpret_cast<void*>(function);
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fast_call() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

inline PyTypeObject* make_type(PyType_Spec& spec) {
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) throw python_error();
  return reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace paramkit
