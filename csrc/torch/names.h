// The tensors of a model by their names, looked up one by one: a block that writes to three of a
// thousand tensors pays for three.
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
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

  // A new reference: the first name of a tensor.
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
  bool index_tensors();
  bool visit(PyObject* module, uint32_t place, std::vector<PyObject*>& path);
  void add_origin(PyObject* tensor, PyObject* key, uint32_t place);
  size_t slot_of(PyObject* tensor) const;
  std::string prefix(uint32_t place) const;

  PyObject* model_ = nullptr;
  bool is_module_ = false;
  PyObject* found_ = nullptr;
  std::vector<Link> links_;
  std::vector<Level> levels_;
  PyObject* last_ = nullptr;      // the name that levels_ lead to
  PyObject* last_key_ = nullptr;  // its last part

  // Where tensors are found first, for keys that are tensors; made when one is first asked for. A name is put
  // together only for a tensor that is looked up.
  struct Origin {
    PyObject *tensor, *key;  // held; key: the last part of its name
    uint32_t place;
  };
  struct Place {
    uint32_t parent;
    PyObject* key;  // held; null for the model itself
  };
  std::vector<Origin> origins_;
  std::vector<Place> places_;
  std::vector<uint32_t> slots_;  // open addressing; index of an origin + 1, or 0
  bool indexed_ = false;
};

}  // namespace paramkit
