#pragma once

#include <Python.h>

namespace paramkit {

// Adds the types Recorder and Handle: the compiled half of paramkit.writes(), see paramkit/writes.py.
// They take what is plain, fast, and hand everything else, errors above all, to Python.
void add_recorder(PyObject* module);

}  // namespace paramkit
