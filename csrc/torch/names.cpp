#include "torch/names.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <unordered_map>
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

size_t Names::slot_of(PyObject* tensor) const {
  size_t slot = (reinterpret_cast<uintptr_t>(tensor) >> 4) * 0x9E3779B97F4A7C15U >> 20;
  for (const size_t mask = slots_.size() - 1;; ++slot) {
    const uint32_t index = slots_[slot & mask];
    if (index == 0 || origins_[index - 1].tensor == tensor) return slot & mask;
  }
}

void Names::add_origin(PyObject* tensor, PyObject* key, uint32_t place) {
  origins_.push_back({Py_NewRef(tensor), Py_NewRef(key), place});
}

std::string Names::prefix(uint32_t place) const {
  if (places_[place].key == nullptr) return {};
  return prefix(places_[place].parent).append(ascii(places_[place].key)).append(".");
}

PyObject* Names::name_of(PyObject* tensor) {
  if (!indexed_) {
    indexed_ = true;
    slots_.assign(1, 0);
    const size_t known = index_tensors() ? origins_.size() : 0;
    size_t size = 16;
    while (size < 2 * known) size *= 2;
    slots_.assign(size, 0);
    for (size_t i = 0; i < known; ++i) {
      uint32_t& index = slots_[slot_of(origins_[i].tensor)];
      if (index == 0) index = static_cast<uint32_t>(i + 1);
    }
  }
  const uint32_t index = slots_[slot_of(tensor)];
  if (index == 0) return nullptr;
  const Origin& origin = origins_[index - 1];
  if (!is_module_ || origin.place == 0) return Py_NewRef(origin.key);
  return text(prefix(origin.place).append(ascii(origin.key))).release().ptr();
}

bool Names::index_tensors() {
  places_.push_back({0, nullptr});
  std::vector<PyObject*> path;
  if (is_module_) return visit(model_, 0, path);
  PyObject *name = nullptr, *tensor = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(found_, &at, &name, &tensor) != 0;) add_origin(tensor, name, 0);
  return true;
}

// In the order of a state dict; see module_tensors() in paramkit/sources.py.
bool Names::visit(PyObject* module, uint32_t place, std::vector<PyObject*>& path) {
  ModuleTables tables{};
  if (path.size() > kDeepest || !read_tables(module, tables)) return false;
  path.push_back(module);
  PyObject *key = nullptr, *value = nullptr;
  for (PyObject* held : {tables.parameters, tables.buffers}) {
    for (Py_ssize_t at = 0; PyDict_Next(held, &at, &key, &value) != 0;) {
      if (!PyUnicode_CheckExact(key) || !PyUnicode_IS_ASCII(key)) return false;
      if (value != Py_None && !(held == tables.buffers && is_transient(tables, key))) add_origin(value, key, place);
    }
  }
  for (Py_ssize_t at = 0; PyDict_Next(tables.modules, &at, &key, &value) != 0;) {
    if (!PyUnicode_CheckExact(key) || !PyUnicode_IS_ASCII(key)) return false;
    if (value == Py_None || std::find(path.begin(), path.end(), value) != path.end()) continue;
    places_.push_back({place, Py_NewRef(key)});
    if (!visit(value, static_cast<uint32_t>(places_.size() - 1), path)) return false;
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
  for (const Origin& origin : origins_) Py_VISIT(origin.tensor);
  return 0;
}

void Names::clear() {
  while (!levels_.empty()) pop();
  indexed_ = false;
  slots_.clear();
  const auto links = std::exchange(links_, {});
  const auto origins = std::exchange(origins_, {});
  const auto places = std::exchange(places_, {});
  Py_CLEAR(last_);
  Py_CLEAR(last_key_);
  Py_CLEAR(found_);
  Py_CLEAR(model_);
  for (const Link& link : links) Py_DECREF(link.table), Py_DECREF(link.key), Py_DECREF(link.value);
  for (const Origin& origin : origins) Py_DECREF(origin.tensor), Py_DECREF(origin.key);
  for (const Place& place : places) Py_XDECREF(place.key);
}

}  // namespace paramkit
