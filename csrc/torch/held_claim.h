// The type Claim of the module: a claim as a context manager, for writes of several calls.
#pragma once

#include <Python.h>

#include <string>

#include "torch/claims.h"

namespace paramkit {

// Adds the type: Claim(dsts, srcs, doing="write").
void add_claim(PyObject* module);

// A claim of what a Python object claims, which it keeps. A new reference.
PyObject* claim_of(PyObject* owner, const Claimant& claimant, const std::string& doing);

}  // namespace paramkit
