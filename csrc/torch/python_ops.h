#pragma once

#include <Python.h>

namespace paramkit {

// The operators as Python functions: lists are parsed here, without the dispatcher and without a
// vector of tensors.
extern PyMethodDef kOperators[];

}  // namespace paramkit
