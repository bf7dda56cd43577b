// Python's objects, and what an nn.Module keeps its tensors and children in, without running Python code.
#pragma once

#include <Python.h>
#include <torch/csrc/Exceptions.h>

namespace paramkit {

inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// A tuple to be filled. Allocating one may start the garbage collector, and with it anybody's code, while
// the caller has borrowed what is to go in: not now.
inline PyObject* new_tuple(Py_ssize_t size) {
  const int collecting = PyGC_Disable();
  PyObject* made = PyTuple_New(size);
  if (collecting != 0) PyGC_Enable();
  if (made == nullptr) throw python_error();
  return made;
}

// The attribute names looked up in every module, interned once.
struct ModuleNames {
  PyObject* parameters = interned("_parameters");
  PyObject* buffers = interned("_buffers");
  PyObject* modules = interned("_modules");
  PyObject* transient = interned("_non_persistent_buffers_set");
};

inline const ModuleNames& module_names() {
  static const ModuleNames all;
  return all;
}

// An entry of a dict, borrowed; null if there is none.
inline PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw python_error();
  return value;
}

inline PyObject* table(PyObject* attributes, PyObject* name) {
  PyObject* value = item(attributes, name);
  return value != nullptr && PyDict_Check(value) ? value : nullptr;
}

// Borrowed from the module's own dict, `attributes`.
struct ModuleTables {
  PyObject* attributes;
  PyObject* parameters;
  PyObject* buffers;
  PyObject* modules;
  PyObject* transient;

  // False if one of them is not there, or of another type than nn.Module gives it.
  bool read(PyObject* from) {
    attributes = from;
    parameters = table(from, module_names().parameters);
    buffers = table(from, module_names().buffers);
    modules = table(from, module_names().modules);
    transient = item(from, module_names().transient);
    return parameters != nullptr && buffers != nullptr && modules != nullptr && transient != nullptr &&
           PyAnySet_Check(transient);
  }
};

}  // namespace paramkit
