#include "torch/names.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <string>
#include <utility>

namespace paramkit {

namespace {

namespace py = pybind11;

// Whether an instance of a class keeps its tables in its own dict, where nothing of the class comes
// before them. Looked up once per version of the class: Python gives a class a new version tag whenever
// it, or a base, is changed.
bool plain_class(PyTypeObject* type) {
  static std::unordered_map<PyTypeObject*, std::pair<unsigned int, bool>> seen;
  const auto at = seen.find(type);
  if (at != seen.end() && at->second.first == type->tp_version_tag && type->tp_version_tag != 0) {
    return at->second.second;
  }
  const py::handle cls(reinterpret_cast<PyObject*>(type));
  const py::handle object(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  bool plain = py::object(cls.attr("__getattribute__")).is(py::object(object.attr("__getattribute__")));
  const ModuleNames& names = module_names();
  for (PyObject* name : {names.parameters, names.buffers, names.modules, names.transient}) {
    plain = plain && !py::hasattr(cls, py::handle(name));
  }
  seen[type] = {type->tp_version_tag, plain};
  return plain;
}

bool read_tables(PyObject* module, ModuleTables& tables) {
  if (!plain_class(Py_TYPE(module))) return false;
  PyObject* attributes = PyObject_GenericGetDict(module, nullptr);
  if (attributes == nullptr) throw python_error();
  Py_DECREF(attributes);  // the module holds it
  return tables.read(attributes);
}

bool is_transient(const ModuleTables& tables, PyObject* key) {
  if (PySet_GET_SIZE(tables.transient) == 0) return false;
  const int contained = PySet_Contains(tables.transient, key);
  if (contained < 0) throw python_error();
  return contained == 1;
}

std::string_view ascii(PyObject* text) {
  return {static_cast<const char*>(PyUnicode_DATA(text)), static_cast<size_t>(PyUnicode_GET_LENGTH(text))};
}

py::object text(std::string_view characters) {
  PyObject* made = PyUnicode_FromStringAndSize(characters.data(), static_cast<Py_ssize_t>(characters.size()));
  if (made == nullptr) throw python_error();
  return py::reinterpret_steal<py::object>(made);
}

// Enough for any model; a model that nests deeper is Python's.
constexpr size_t kDeepest = 200;

}  // namespace

bool Names::open(PyObject* model, bool is_module) {
  clear();
  is_module_ = is_module;
  if (is_module) {
    found_ = PyDict_New();
  } else {
    if (!PyDict_CheckExact(model) && !PyODict_CheckExact(model)) return false;
    PyObject *name = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(model, &at, &name, &value) != 0;) {
      if (!PyUnicode_CheckExact(name) || !THPVariable_CheckExact(value)) return false;
    }
    found_ = PyDict_Copy(model);
  }
  if (found_ == nullptr) throw python_error();
  model_ = Py_NewRef(model);
  return !is_module || push(model, 0);
}

PyObject* Names::find(PyObject* name) {
  if (PyObject* tensor = item(found_, name)) return tensor;
  if (!is_module_ || !PyUnicode_IS_ASCII(name) || levels_.empty()) return nullptr;
  keep_shared(ascii(name));
  Py_XSETREF(last_, Py_NewRef(name));
  PyObject* tensor = walk(ascii(name));
  if (tensor != nullptr && PyDict_SetItem(found_, name, tensor) != 0) throw python_error();
  return tensor;
}

// Back to the deepest module that a name shares with the one before.
void Names::keep_shared(std::string_view name) {
  const std::string_view last = last_ == nullptr ? std::string_view() : ascii(last_);
  const auto differ = std::mismatch(last.begin(), last.end(), name.begin(), name.end()).second;
  const auto shared = static_cast<size_t>(differ - name.begin());
  while (levels_.back().end > shared) pop();
}

PyObject* Names::walk(std::string_view name) {
  for (size_t begin = levels_.back().end;;) {
    const size_t dot = name.find('.', begin);
    if (dot == std::string_view::npos) {
      const std::string_view key = name.substr(begin);
      if (last_key_ == nullptr || ascii(last_key_) != key) Py_XSETREF(last_key_, text(key).release().ptr());
      return leaf(last_key_);
    }
    if (!descend(name.substr(begin, dot - begin), dot + 1)) return nullptr;
    begin = dot + 1;
  }
}

PyObject* Names::leaf(PyObject* key) {
  Level& level = levels_.back();
  PyObject* parameter = item(level.tables.parameters, key);
  PyObject* buffer = item(level.tables.buffers, key);
  if (buffer == Py_None || (buffer != nullptr && is_transient(level.tables, key))) buffer = nullptr;
  if (parameter == Py_None) parameter = nullptr;
  if ((parameter == nullptr) == (buffer == nullptr)) return nullptr;
  PyObject* tensor = parameter != nullptr ? parameter : buffer;
  if (!THPVariable_CheckExact(tensor)) return nullptr;
  link(table_of(level, parameter != nullptr ? 0 : 1), key, tensor);
  return tensor;
}

bool Names::descend(std::string_view name, size_t end) {
  const py::object key = text(name);
  PyObject* child = item(levels_.back().tables.modules, key.ptr());
  if (child == nullptr || child == Py_None || levels_.size() > kDeepest) return false;
  for (const Level& level : levels_) {
    if (level.module == child) return false;  // a module inside itself has no names there
  }
  PyObject* table = table_of(levels_.back(), 2);
  if (!push(child, end)) return false;
  link(table, key.ptr(), child);
  return true;
}

bool Names::push(PyObject* module, size_t end) {
  Level level{module, {}, end};
  if (!read_tables(module, level.tables)) return false;
  levels_.push_back(level);
  for (PyObject* held : level.held()) Py_INCREF(held);
  return true;
}

void Names::pop() {
  const Level level = levels_.back();
  levels_.pop_back();
  for (PyObject* held : level.held()) Py_DECREF(held);
}

PyObject* Names::table_of(Level& level, int which) {
  const ModuleNames& names = module_names();
  PyObject* keys[] = {names.parameters, names.buffers, names.modules};
  PyObject* tables[] = {level.tables.parameters, level.tables.buffers, level.tables.modules};
  if (!level.linked[which]) link(level.tables.attributes, keys[which], tables[which]);
  level.linked[which] = true;
  return tables[which];
}

void Names::link(PyObject* table, PyObject* key, PyObject* value) {
  links_.push_back({Py_NewRef(table), Py_NewRef(key), Py_NewRef(value)});
}

bool Names::unchanged() const {
  if (found_ == nullptr) return false;
  if (is_module_) {
    return std::all_of(links_.begin(), links_.end(),
                       [](const Link& link) { return item(link.table, link.key) == link.value; });
  }
  if (PyDict_GET_SIZE(model_) != PyDict_GET_SIZE(found_)) return false;
  PyObject *name = nullptr, *value = nullptr, *old_name = nullptr, *old_value = nullptr;
  Py_ssize_t at = 0, old = 0;
  while (PyDict_Next(model_, &at, &name, &value) != 0) {
    if (PyDict_Next(found_, &old, &old_name, &old_value) == 0 || name != old_name || value != old_value) return false;
  }
  return true;
}

PyObject* Names::name_of(PyObject* tensor) {
  if (!numbered_) {
    numbered_ = true;
    std::vector<PyObject*> path;
    bool known = found_ != nullptr;
    if (is_module_) {
      known = known && number(model_, {}, path);
    } else {
      PyObject *name = nullptr, *value = nullptr;
      for (Py_ssize_t at = 0; known && PyDict_Next(found_, &at, &name, &value) != 0;) {
        if (names_.emplace(value, name).second) Py_INCREF(value), Py_INCREF(name);
      }
    }
    if (!known) {
      for (const auto& [value, name] : std::exchange(names_, {})) Py_DECREF(value), Py_DECREF(name);
    }
  }
  const auto at = names_.find(tensor);
  return at == names_.end() ? nullptr : at->second;
}

// In the order of a state dict; see module_tensors() in paramkit/sources.py.
bool Names::number(PyObject* module, std::string_view prefix, std::vector<PyObject*>& path) {
  ModuleTables tables{};
  if (path.size() > kDeepest || !read_tables(module, tables)) return false;
  path.push_back(module);
  const auto joined = [&](PyObject* key, const char* end) {
    return std::string(prefix).append(ascii(key)).append(end);
  };
  PyObject *key = nullptr, *value = nullptr;
  for (PyObject* held : {tables.parameters, tables.buffers}) {
    for (Py_ssize_t at = 0; PyDict_Next(held, &at, &key, &value) != 0;) {
      if (!PyUnicode_CheckExact(key) || !PyUnicode_IS_ASCII(key)) return false;
      if (value == Py_None || (held == tables.buffers && is_transient(tables, key)) || names_.count(value) != 0)
        continue;
      names_.emplace(Py_NewRef(value), text(joined(key, "")).release().ptr());
    }
  }
  for (Py_ssize_t at = 0; PyDict_Next(tables.modules, &at, &key, &value) != 0;) {
    if (!PyUnicode_CheckExact(key) || !PyUnicode_IS_ASCII(key)) return false;
    if (value == Py_None || std::find(path.begin(), path.end(), value) != path.end()) continue;
    if (!number(value, joined(key, "."), path)) return false;
  }
  path.pop_back();
  return true;
}

int Names::traverse(visitproc visit, void* arg) const {
  Py_VISIT(model_);
  Py_VISIT(found_);
  for (const Level& level : levels_) {
    for (PyObject* held : level.held()) Py_VISIT(held);
  }
  for (const Link& link : links_) {
    Py_VISIT(link.table);
    Py_VISIT(link.value);
  }
  for (const auto& [tensor, name] : names_) Py_VISIT(tensor);
  return 0;
}

void Names::clear() {
  numbered_ = true;
  while (!levels_.empty()) pop();
  const auto links = std::exchange(links_, {});
  const auto names = std::exchange(names_, {});
  Py_CLEAR(last_);
  Py_CLEAR(last_key_);
  Py_CLEAR(found_);
  Py_CLEAR(model_);
  for (const Link& link : links) Py_DECREF(link.table), Py_DECREF(link.key), Py_DECREF(link.value);
  for (const auto& [tensor, name] : names) Py_DECREF(tensor), Py_DECREF(name);
  numbered_ = false;
}

}  // namespace paramkit
