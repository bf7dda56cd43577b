#include "torch/load_state_dict.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <unordered_map>
#include <vector>

#include "torch/batch.h"
#include "torch/claims.h"
#include "torch/modules.h"
#include "torch/scratch.h"

namespace paramkit {

namespace {

namespace py = pybind11;

// The attribute names looked up in every module, interned once.
struct Names {
  PyObject* pre_hooks = interned("_load_state_dict_pre_hooks");
  PyObject* post_hooks = interned("_load_state_dict_post_hooks");
  PyObject* load = interned("_load_from_state_dict");
};

const Names& names() {
  static const Names all;
  return all;
}

// torch's own implementations; never freed, as modules of the interpreter are.
struct Standard {
  py::object module = py::module_::import("torch.nn").attr("Module");
  py::object load = module.attr("_load_from_state_dict");
  // Acts only on checkpoints without num_batches_tracked, whose missing name ends the shortcut anyway.
  py::object batch_norm_load =
      py::module_::import("torch.nn.modules.batchnorm").attr("_NormBase").attr("_load_from_state_dict");
  py::object set_extra_state = module.attr("set_extra_state");
};

const Standard& standard() {
  static const auto* all = new Standard;
  return *all;
}

// Whether modules of a class load in the standard way. Looked up once per version of the class: Python
// gives a class a new version tag whenever it, or a base, is changed.
bool standard_class(PyTypeObject* type) {
  struct Entry {
    unsigned int version;
    bool standard;
  };
  static std::unordered_map<PyTypeObject*, Entry> seen;
  const auto found = seen.find(type);
  if (found != seen.end() && found->second.version == type->tp_version_tag && type->tp_version_tag != 0) {
    return found->second.standard;
  }
  const py::handle cls(reinterpret_cast<PyObject*>(type));
  const py::object load = cls.attr("_load_from_state_dict");
  const bool is_standard = (load.is(standard().load) || load.is(standard().batch_norm_load)) &&
                           py::object(cls.attr("set_extra_state")).is(standard().set_extra_state);
  seen[type] = {type->tp_version_tag, is_standard};
  return is_standard;
}

// torch's copies carry it along.
bool carries_tangent(const at::Tensor& tensor) { return on_autograd(*tensor.unsafeGetTensorImpl(), false); }

class Loader : public Claimant {
 public:
  Loader(Batch& batch, PyObject* state_dict) : batch_(batch), state_dict_(state_dict) {}

  // False: something here is not standard, or not in the state dict.
  bool visit(PyObject* module, PyObject* prefix) {
    // A module that contains itself: torch says what it thinks of that.
    constexpr int kDeepest = 500;
    if (++depth_ > kDeepest) return false;
    const bool standard = visit_module(module, prefix);
    --depth_;
    return standard;
  }

  Py_ssize_t loaded() const { return loaded_; }

  const Extent& extent() const override {
    if (known_) return extent_;
    std::vector<Range> ranges[2];
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const at::TensorImpl& impl = *THPVariable_Unpack(tensors_[i]).unsafeGetTensorImpl();
      if (impl.numel() > 0) ranges[i % 2].push_back(range(impl));
    }
    extent_ = {merged(std::move(ranges[0])), merged(std::move(ranges[1]))};
    known_ = true;
    return extent_;
  }

  // References to all tensors.
  py::object hold() const {
    const auto held = py::reinterpret_steal<py::object>(new_tuple(static_cast<Py_ssize_t>(tensors_.size())));
    for (size_t i = 0; i < tensors_.size(); ++i) {
      PyTuple_SET_ITEM(held.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(tensors_[i]));
    }
    return held;
  }

 private:
  bool visit_module(PyObject* module, PyObject* prefix) {
    if (!standard_class(Py_TYPE(module))) return false;
    const auto instance = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!instance) throw python_error();
    PyObject* attributes = instance.ptr();
    ModuleTables tables;
    PyObject* pre_hooks = table(attributes, names().pre_hooks);
    PyObject* post_hooks = table(attributes, names().post_hooks);
    if (!tables.read(attributes) || pre_hooks == nullptr || post_hooks == nullptr || PyDict_GET_SIZE(pre_hooks) > 0 ||
        PyDict_GET_SIZE(post_hooks) > 0 || item(attributes, names().load) != nullptr) {
      return false;
    }
    return add_all(tables.parameters, prefix, nullptr) &&
           add_all(tables.buffers, prefix, PySet_GET_SIZE(tables.transient) > 0 ? tables.transient : nullptr) &&
           visit_children(tables.modules, prefix);
  }

  static py::object join(PyObject* prefix, PyObject* name) {
    PyObject* joined = prefix == nullptr ? Py_NewRef(name) : PyUnicode_Concat(prefix, name);
    if (joined == nullptr) throw python_error();
    return py::reinterpret_steal<py::object>(joined);
  }

  bool add_all(PyObject* tensors, PyObject* prefix, PyObject* skip) {
    PyObject *name = nullptr, *value = nullptr;
    Py_ssize_t position = 0;
    while (PyDict_Next(tensors, &position, &name, &value) != 0) {
      if (value == Py_None) continue;
      if (skip != nullptr) {
        const int contained = PySet_Contains(skip, name);
        if (contained < 0) throw python_error();
        if (contained == 1) continue;
      }
      PyObject* source = item(state_dict_, join(prefix, name).ptr());
      if (source == nullptr || !THPVariable_CheckExact(value) || !THPVariable_CheckExact(source)) return false;
      const at::Tensor& dst = THPVariable_Unpack(value);
      const at::Tensor& src = THPVariable_Unpack(source);
      if (access(*dst.unsafeGetTensorImpl()) != Access::Plain || access(*src.unsafeGetTensorImpl()) == Access::Native ||
          dst.sizes() != src.sizes() || carries_tangent(dst) || carries_tangent(src)) {
        return false;
      }
      batch_.copy({"load_state_dict", loaded_}, dst, src);
      tensors_.push_back(value);
      tensors_.push_back(source);
      ++loaded_;
    }
    return true;
  }

  bool visit_children(PyObject* modules, PyObject* prefix) {
    static PyObject* const dot = interned(".");
    PyObject *name = nullptr, *child = nullptr;
    Py_ssize_t position = 0;
    while (PyDict_Next(modules, &position, &name, &child) != 0) {
      if (child == Py_None) continue;
      if (!visit(child, join(join(prefix, name).ptr(), dot).ptr())) return false;
    }
    return true;
  }

  Batch& batch_;
  PyObject* state_dict_;
  std::vector<PyObject*> tensors_;  // borrowed from the model and the state dict
  mutable Extent extent_;
  mutable bool known_ = false;
  Py_ssize_t loaded_ = 0;
  int depth_ = 0;
};

}  // namespace

void prepare_load_state_dict() {
  (void)names();
  (void)module_names();
  (void)standard();
}

bool load_state_dict(PyObject* model, PyObject* state_dict, bool waits) {
  if (!PyDict_Check(state_dict) || !plain_context()) return false;  // a mode wants to see the copies
  const Scratch batch;
  batch->set_autograd(Batch::Autograd::Ignore);
  Loader loader(*batch, state_dict);
  try {
    if (!loader.visit(model, nullptr) || loader.loaded() != PyDict_GET_SIZE(state_dict)) return false;
  } catch (const c10::Error&) {
    return false;  // torch's own way says it better
  }
  // Another thread may change the model or the state dict while the GIL is given up.
  const bool gives_up_gil = batch->runs_python();
  const py::object held = gives_up_gil || Claim::others() ? loader.hold() : py::none();
  if (!waits && Claim::others()) return false;
  const Claim claim(gives_up_gil, loader);
  if (claim.waited()) return false;  // the tensors may be others now
  batch->run(false);
  return true;
}

}  // namespace paramkit
