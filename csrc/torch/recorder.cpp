#include "torch/recorder.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "core/normalize.h"
#include "torch/basic_index.h"
#include "torch/batch.h"
#include "torch/claims.h"
#include "torch/names.h"
#include "torch/python_types.h"
#include "torch/threads.h"

namespace paramkit {

namespace {

namespace py = pybind11;

// A number as an element of its destination's dtype.
struct Number {
  std::array<char, 16> bytes;
  c10::ScalarType type;
};

// One assignment.
struct Entry {
  PyObject* name;    // held
  PyObject* tensor;  // borrowed from the names
  PyObject* value;   // held; null for a number
  uint32_t version;  // of the value when it was recorded
  uint32_t number;
  size_t index;  // its first word
};

struct Recording {
  Names names;
  std::vector<Entry> entries;
  std::vector<int64_t> words;  // of the indices
  std::vector<Number> numbers;
  PyObject* last_number = nullptr;  // the object that numbers.back() was made of

  Recording() = default;
  ~Recording() { clear(); }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  bool record(PyObject* name, PyObject* tensor, PyObject* index, PyObject* value);
  bool run() const;
  py::list entries_for_python() const;
  void clear_entries();

  void clear() {
    clear_entries();
    names.clear();
  }

 private:
  bool convert(PyObject* value, c10::ScalarType type);
};

const at::TensorImpl& impl_of(PyObject* tensor) { return *THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

// --- recording ---------------------------------------------------------------------------------

// Sets numbers.back() to the element that torch's slice assignment makes of a number. False where that
// is left to torch: another type, or a value that the dtype does not hold.
bool Recording::convert(PyObject* value, c10::ScalarType type) {
  if (value == last_number && numbers.back().type == type) return true;
  c10::Scalar scalar;
  if (PyFloat_CheckExact(value)) {
    scalar = PyFloat_AS_DOUBLE(value);
  } else if (PyBool_Check(value)) {
    scalar = static_cast<int64_t>(value == Py_True);
  } else if (PyLong_CheckExact(value)) {
    int overflow = 0;
    scalar = static_cast<int64_t>(PyLong_AsLongLongAndOverflow(value, &overflow));
    if (overflow != 0) return false;
  } else {
    return false;
  }
  if (c10::isQIntType(type) || !plain_context()) return false;
  Number number{{}, type};
  try {
    scalar_bytes(scalar, type, 1, number.bytes.data());
  } catch (const std::exception&) {
    return false;
  }
  numbers.push_back(number);
  Py_XSETREF(last_number, Py_NewRef(value));
  return true;
}

bool Recording::record(PyObject* name, PyObject* tensor, PyObject* index, PyObject* value) {
  Entry entry{name, tensor, nullptr, 0, 0, words.size()};
  if (THPVariable_CheckExact(value)) {
    const at::TensorImpl& impl = impl_of(value);
    if (access(impl) != Access::Plain) return false;
    entry.value = value;
    entry.version = impl.version_counter().current_version();
  } else {
    if (!THPVariable_CheckExact(tensor) || !convert(value, THPVariable_Unpack(tensor).scalar_type())) return false;
    entry.number = static_cast<uint32_t>(numbers.size() - 1);
  }
  if (!encode_index(index, words)) return false;
  entries.push_back(entry);
  Py_INCREF(name);
  Py_XINCREF(entry.value);
  return true;
}

void Recording::clear_entries() {
  words.clear();
  numbers.clear();
  Py_CLEAR(last_number);
  for (const Entry& entry : std::exchange(entries, {})) {
    Py_DECREF(entry.name);
    Py_XDECREF(entry.value);
  }
}

// (name, index, value, its version or None) of each assignment.
py::list Recording::entries_for_python() const {
  py::list all;
  for (const Entry& entry : entries) {
    const auto index = py::reinterpret_steal<py::object>(decode_index(&words[entry.index]));
    if (!index) throw python_error();
    const auto name = py::reinterpret_borrow<py::object>(entry.name);
    if (entry.value != nullptr) {
      all.append(py::make_tuple(name, index, py::handle(entry.value), entry.version));
      continue;
    }
    const Number& number = numbers[entry.number];
    // Not through the dispatcher: no mode that is active now was when the number was recorded.
    const at::Tensor value(at::detail::empty_cpu({}, number.type));
    std::memcpy(value.mutable_data_ptr(), number.bytes.data(), value.element_size());
    all.append(py::make_tuple(name, index, value, py::none()));
  }
  return all;
}

// --- the pass ----------------------------------------------------------------------------------

// The bytes that an assignment writes or reads.
struct Span {
  const char* begin;
  const char* end;
  uint32_t entry;
  bool written;
};

bool plain(PyObject* tensor) {
  if (!THPVariable_CheckExact(tensor)) return false;
  const at::TensorImpl& impl = impl_of(tensor);
  return access(impl) == Access::Plain && has_memory(impl);
}

// The loops of `part <- value`, as torch's slice assignment: the value broadcasts, and may have more
// dimensions than the part if those are of size 1. False if it does not fit.
bool loops(const Part& part, int64_t width, const at::TensorImpl* value, int64_t src_width, Dim* dims) {
  for (int i = 0; i < part.rank; ++i) dims[i] = {part.sizes[i], part.strides[i] * width, 0};
  if (value == nullptr) return true;
  const auto sizes = value->sizes(), strides = value->strides();
  const auto excess = static_cast<int64_t>(sizes.size()) - part.rank;
  for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i) {
    const auto at = static_cast<size_t>(i);
    if (i < excess ? sizes[at] != 1 : sizes[at] != 1 && sizes[at] != part.sizes[i - excess]) return false;
    if (i >= excess && sizes[at] != 1) dims[i - excess].src = strides[at] * src_width;
  }
  return true;
}

// False, and nothing added, where the kernels cannot do it.
bool add(Program& program, char* dst, c10::ScalarType to, const char* src, c10::ScalarType from, const Dim* dims,
         int rank) {
  Type to_kernel{}, from_kernel{};
  return kernel_types(to, from, to_kernel, from_kernel) && program.add(dst, src, to_kernel, from_kernel, dims, rank);
}

bool may_repeat_an_element(const at::TensorImpl& impl) {
  if (impl.is_contiguous()) return false;
  Dim dims[kMaxRank];
  const auto rank = static_cast<int>(impl.dim());
  for (int i = 0; i < rank; ++i) {
    dims[i] = {impl.sizes()[static_cast<size_t>(i)], impl.strides()[static_cast<size_t>(i)], 0};
  }
  const int left = normalize(dims, rank);
  return left > 0 && !injective(dims, left, 1);
}

// Whether writes to one tensor, whose spans touch, certainly have no element in common.
bool apart(const Recording& recording, const Span* spans, size_t n) {
  constexpr size_t kMost = 256;  // each is compared with each
  if (n > kMost) return false;
  const at::TensorImpl& dst = impl_of(recording.entries[spans[0].entry].tensor);
  const auto rank = static_cast<size_t>(dst.dim());
  std::vector<Steps> steps(n * rank);
  for (size_t i = 0; i < n; ++i) {
    const Entry& entry = recording.entries[spans[i].entry];
    Part part;
    if (!spans[i].written || &impl_of(entry.tensor) != &dst) return false;
    if (!resolve_index(&recording.words[entry.index], dst.sizes(), dst.strides(), part, &steps[i * rank])) return false;
  }
  if (may_repeat_an_element(dst)) return false;
  for (size_t i = 0; i < n; ++i) {
    for (size_t k = 0; k < i; ++k) {
      if (!apart(&steps[i * rank], &steps[k * rank], rank)) return false;
    }
  }
  return true;
}

// Whether no assignment writes what another one writes, or what any one reads.
bool apart(const Recording& recording, std::vector<Span>& spans) {
  const auto before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (!std::is_sorted(spans.begin(), spans.end(), before)) std::sort(spans.begin(), spans.end(), before);
  for (size_t first = 0, last = 0; first < spans.size(); first = last) {
    const char* end = spans[first].end;
    bool written = spans[first].written;
    for (last = first + 1; last < spans.size() && spans[last].begin < end; ++last) {
      end = std::max(end, spans[last].end);
      written = written || spans[last].written;
    }
    if (written && last > first + 1 && !apart(recording, &spans[first], last - first)) return false;
  }
  return true;
}

// The memory of assignments, for other threads.
struct Spans : Claimant {
  const std::vector<Span>& spans;
  mutable Extent memory;
  mutable bool known = false;

  explicit Spans(const std::vector<Span>& all) : spans(all) {}

  const Extent& extent() const override {
    if (known) return memory;
    for (const Span& span : spans) (span.written ? memory.dsts : memory.srcs).push_back({span.begin, span.end});
    memory = {merged(std::move(memory.dsts)), merged(std::move(memory.srcs))};
    known = true;
    return memory;
  }
};

// False, and nothing written, if something here is not plain, does not fit or is not known to be apart, or if
// another thread was waited for: the tensors may be others now.
bool Recording::run() const {
  if (!plain_context() || !names.unchanged()) return false;
  Program program;
  program.tasks.reserve(entries.size());
  std::vector<Span> spans;
  spans.reserve(entries.size());
  std::vector<PyObject*> empty;
  for (size_t i = 0; i < entries.size(); ++i) {
    const Entry& entry = entries[i];
    if (!plain(entry.tensor)) return false;
    const at::TensorImpl& dst = impl_of(entry.tensor);
    const auto type = c10::typeMetaToScalarType(dst.dtype());
    const auto width = static_cast<int64_t>(dst.itemsize());
    Part part;
    if (!resolve_index(&words[entry.index], dst.sizes(), dst.strides(), part, nullptr)) return false;
    for (size_t k = 0; k < dst.sizes().size(); ++k) {
      if (dst.strides()[k] == 0 && dst.sizes()[k] > 1) return false;  // an expanded tensor
    }
    const at::TensorImpl* value = nullptr;
    const char* src = nullptr;
    if (entry.value != nullptr) {
      if (!plain(entry.value)) return false;
      value = &impl_of(entry.value);
      if (value->version_counter().current_version() != entry.version) return false;
      src = data(*value);
    } else {
      src = numbers[entry.number].bytes.data();
    }
    const auto src_type = value != nullptr ? c10::typeMetaToScalarType(value->dtype()) : numbers[entry.number].type;
    const auto src_width = static_cast<int64_t>(c10::elementSize(src_type));
    Dim dims[kMaxRank];
    if (!loops(part, width, value, src_width, dims)) return false;
    char* begin = data(dst) + part.offset * width;
    const size_t tasks = program.tasks.size();
    if (!add(program, begin, type, src, src_type, dims, part.rank)) return false;
    if (program.tasks.size() == tasks) {
      empty.push_back(entry.tensor);
      continue;
    }
    if (value == nullptr) program.make_number();
    int64_t written = width, read = src_width;
    for (int k = 0; k < part.rank; ++k) {
      written += (dims[k].size - 1) * dims[k].dst;
      read += (dims[k].size - 1) * dims[k].src;
    }
    spans.push_back({begin, begin + written, static_cast<uint32_t>(i), true});
    if (value != nullptr) spans.push_back({src, src + read, static_cast<uint32_t>(i), false});
  }
  if (!apart(*this, spans)) return false;
  const Spans memory(spans);
  const Claim claim(program.bytes >= kReleaseGil, memory);
  if (claim.waited()) return false;

  // Spans of one tensor mostly follow each other now. Raising a version twice does no harm.
  const at::TensorImpl* last = nullptr;
  const auto raise = [&last](PyObject* tensor) {
    at::TensorImpl* impl = THPVariable_Unpack(tensor).unsafeGetTensorImpl();
    if (impl != last) impl->bump_version();
    last = impl;
  };
  for (const Span& span : spans) {
    if (span.written) raise(entries[span.entry].tensor);
  }
  for (PyObject* tensor : empty) raise(tensor);
  routes().add(program);
  run_tasks(program, 0, program.tasks.size(), true);
  return true;
}

// --- the Python types --------------------------------------------------------------------------

struct RecorderObject {
  PyObject_HEAD;
  bool fast;  // assignments are recorded here; otherwise Python's _assign does it
  Recording recording;
};

struct HandleObject {
  PyObject_HEAD;
  PyObject* owner;
  PyObject* name;
  PyObject* tensor;  // null: Python does all
};

PyTypeObject* handle_type = nullptr;

// Python's half, looked up on the recorder.
struct Methods {
  PyObject* find = interned("_find");
  PyObject* assign = interned("_assign");
  PyObject* refuse = interned("_refuse_read");
};

const Methods& methods() {
  static const Methods all;
  return all;
}

RecorderObject* recorder(PyObject* object) { return reinterpret_cast<RecorderObject*>(object); }
HandleObject* handle(PyObject* object) { return reinterpret_cast<HandleObject*>(object); }

PyObject* make_handle(PyObject* owner, PyObject* name, PyObject* tensor) {
  auto* made = PyObject_GC_New(HandleObject, handle_type);
  if (made == nullptr) throw python_error();
  made->owner = Py_NewRef(owner);
  made->name = Py_NewRef(name);
  made->tensor = Py_XNewRef(tensor);
  PyObject_GC_Track(made);
  return reinterpret_cast<PyObject*>(made);
}

PyObject* recorder_new(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = type->tp_alloc(type, 0);
  if (self != nullptr) new (&recorder(self)->recording) Recording;
  return self;
}

int recorder_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Recording& recording = recorder(self)->recording;
  for (const Entry& entry : recording.entries) Py_VISIT(entry.value);
  Py_VISIT(recording.last_number);
  return recording.names.traverse(visit, arg);
}

int recorder_clear(PyObject* self) {
  recorder(self)->fast = false;
  recorder(self)->recording.clear();
  return 0;
}

void recorder_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  recorder(self)->recording.~Recording();
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* recorder_get(PyObject* self, PyObject* key) {
  HANDLE_TH_ERRORS
  RecorderObject* const owner = recorder(self);
  if (owner->fast) {
    Names& names = owner->recording.names;
    py::object made;
    if (THPVariable_CheckExact(key)) made = py::reinterpret_steal<py::object>(names.name_of(key));
    PyObject* name = PyUnicode_CheckExact(key) ? key : made.ptr();
    PyObject* tensor = name != nullptr ? names.find(name) : nullptr;
    if (tensor != nullptr) return make_handle(self, name, tensor);
  }
  const auto name = py::reinterpret_steal<py::object>(PyObject_CallMethodOneArg(self, methods().find, key));
  if (!name) throw python_error();
  return make_handle(self, name.ptr(), nullptr);
  END_HANDLE_TH_ERRORS
}

PyObject* recorder_open(PyObject* self, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n == 2, "_open: expected 2 arguments, got ", n);
  return PyBool_FromLong(recorder(self)->recording.names.open(args[0], args[1] == Py_True));
  END_HANDLE_TH_ERRORS
}

PyObject* recorder_run(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  return PyBool_FromLong(recorder(self)->recording.run());
  END_HANDLE_TH_ERRORS
}

PyObject* recorder_take(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  recorder(self)->fast = false;
  py::list entries = recorder(self)->recording.entries_for_python();
  recorder(self)->recording.clear_entries();
  return entries.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* recorder_tensors(PyObject* self, PyObject*) {
  PyObject* found = recorder(self)->recording.names.found();
  return found != nullptr ? PyDict_Copy(found) : PyDict_New();
}

int handle_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(handle(self)->owner);
  Py_VISIT(handle(self)->tensor);
  return 0;
}

void handle_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  Py_XDECREF(handle(self)->owner);
  Py_XDECREF(handle(self)->name);
  Py_XDECREF(handle(self)->tensor);
  PyObject_GC_Del(self);
  Py_DECREF(type);
}

int handle_set(PyObject* self, PyObject* index, PyObject* value) {
  HANDLE_TH_ERRORS
  const HandleObject& at = *handle(self);
  TORCH_CHECK_TYPE(value != nullptr, "'Handle' object doesn't support item deletion");
  if (at.tensor != nullptr && recorder(at.owner)->fast &&
      recorder(at.owner)->recording.record(at.name, at.tensor, index, value)) {
    return 0;
  }
  const auto done = py::reinterpret_steal<py::object>(
      PyObject_CallMethodObjArgs(at.owner, methods().assign, at.name, index, value, nullptr));
  return done ? 0 : -1;
  END_HANDLE_TH_ERRORS_RET(-1)
}

PyObject* handle_get(PyObject* self, PyObject* index) {
  return PyObject_CallMethodObjArgs(handle(self)->owner, methods().refuse, handle(self)->name, index, nullptr);
}

PyObject* handle_repr(PyObject* self) {
  return PyUnicode_FromFormat("<handle of %U, for assignments only>", handle(self)->name);
}

PyMethodDef recorder_methods[] = {
    {"_open", fast_call<recorder_open>(), METH_FASTCALL, "_open(model, is_module) -> whether it knows its names"},
    {"_run", recorder_run, METH_NOARGS, "_run() -> whether it wrote; otherwise nothing was written"},
    {"_take", recorder_take, METH_NOARGS, "_take() -> [(name, index, value, version)], and none are left"},
    {"_tensors", recorder_tensors, METH_NOARGS, "_tensors() -> name to tensor, of every name looked up"},
    {nullptr, nullptr, 0, nullptr},
};

PyObject* recorder_get_fast(PyObject* self, void*) { return PyBool_FromLong(recorder(self)->fast); }

int recorder_set_fast(PyObject* self, PyObject* value, void*) {
  recorder(self)->fast = value == Py_True && recorder(self)->recording.names.found() != nullptr;
  return 0;
}

PyGetSetDef recorder_attributes[] = {
    {"_fast", recorder_get_fast, recorder_set_fast, "whether assignments are recorded here", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace

void add_recorder(PyObject* module) {
  (void)methods();
  (void)module_names();
  PyType_Slot recorder_slots[] = {
      {Py_tp_new, slot(recorder_new)},           {Py_tp_dealloc, slot(recorder_dealloc)},
      {Py_tp_traverse, slot(recorder_traverse)}, {Py_tp_clear, slot(recorder_clear)},
      {Py_mp_subscript, slot(recorder_get)},     {Py_tp_methods, recorder_methods},
      {Py_tp_getset, recorder_attributes},       {0, nullptr},
  };
  PyType_Spec recorder_spec = {"paramkit._C.Recorder", sizeof(RecorderObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, recorder_slots};
  PyType_Slot handle_slots[] = {
      {Py_tp_dealloc, slot(handle_dealloc)}, {Py_tp_traverse, slot(handle_traverse)}, {Py_tp_repr, slot(handle_repr)},
      {Py_mp_subscript, slot(handle_get)},   {Py_mp_ass_subscript, slot(handle_set)}, {0, nullptr},
  };
  PyType_Spec handle_spec = {"paramkit._C.Handle", sizeof(HandleObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, handle_slots};
  handle_type = make_type(handle_spec);
  PyTypeObject* recorder_type = make_type(recorder_spec);
  if (PyModule_AddObjectRef(module, "Recorder", reinterpret_cast<PyObject*>(recorder_type)) != 0 ||
      PyModule_AddObjectRef(module, "Handle", reinterpret_cast<PyObject*>(handle_type)) != 0) {
    throw python_error();
  }
  Py_DECREF(recorder_type);  // the module holds it
}

}  // namespace paramkit
