// The tensors of a model by their names, looked up one by one: a block that writes to three of a
// thousand tensors pays for three.
#pragma once

#include <Python.h>

#include <array>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "torch/modules.h"

namespace paramkit {

// Holds the model, and every object that led to a tensor, until it is cleared. What it does not know,
// or not for certain, is left to Python: each lookup may say null.
class Names {
 public:
  Names() = default;
  ~Names() { clear(); }
  Names(const Names&) = delete;
  Names& operator=(const Names&) = delete;

  // False for anything but a dict (or OrderedDict) from str to tensors, or a module that keeps its tensors as
  // nn.Module does.
  bool open(PyObject* model, bool is_module);

  // Borrowed: the tensor of a name, which is exactly torch's Tensor or Parameter.
  PyObject* find(PyObject* name);

  // Borrowed: the first name of a tensor.
  PyObject* name_of(PyObject* tensor);

  // Whether every name that was found still leads to the same tensor.
  bool unchanged() const;

  // Borrowed: a dict that has every name that was found, with its tensor. Null before open().
  PyObject* found() const { return found_; }

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  // `table[key] is value` led to a tensor.
  struct Link {
    PyObject *table, *key, *value;
  };

  // A module on the way to the last name that was looked up. Its tables are held: the user may change
  // the model between two names.
  struct Level {
    PyObject* module;
    ModuleTables tables;
    size_t end;  // of its prefix in that name, behind the dot
    bool linked[3] = {false, false, false};

    std::array<PyObject*, 6> held() const {
      return {module, tables.attributes, tables.parameters, tables.buffers, tables.modules, tables.transient};
    }
  };

  void keep_shared(std::string_view name);
  PyObject* walk(std::string_view name);
  PyObject* leaf(PyObject* key);
  bool descend(std::string_view key, size_t end);
  bool push(PyObject* module, size_t end);
  void pop();
  PyObject* table_of(Level& level, int which);
  void link(PyObject* table, PyObject* key, PyObject* value);
  bool number(PyObject* module, std::string_view prefix, std::vector<PyObject*>& path);

  PyObject* model_ = nullptr;
  bool is_module_ = false;
  PyObject* found_ = nullptr;
  std::vector<Link> links_;
  std::vector<Level> levels_;
  PyObject* last_ = nullptr;                        // the name that levels_ lead to
  PyObject* last_key_ = nullptr;                    // its last part
  std::unordered_map<PyObject*, PyObject*> names_;  // of tensors; both held
  bool numbered_ = false;
};

}  // namespace paramkit
