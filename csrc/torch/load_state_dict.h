#pragma once

#include <Python.h>

namespace paramkit {

// Loads a state dict whose names and shapes match the model exactly, where every module of the model
// loads in torch's standard way. Returns false, with nothing written, in every other case: those are
// left to torch's own Module.load_state_dict, which knows about hooks and says what is wrong.
// `waits`: for another thread's write of the same tensors; otherwise that is a case for torch, too.
bool load_state_dict(PyObject* model, PyObject* state_dict, bool waits);

// Looks up torch's own implementations, at import.
void prepare_load_state_dict();

}  // namespace paramkit
