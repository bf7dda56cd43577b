#include "torch/held_claim.h"

#include <c10/util/Exception.h>

#include <optional>
#include <utility>
#include <vector>

#include "torch/python_types.h"

namespace paramkit {

namespace py = pybind11;

namespace {

// It holds no tensor: a plan of lists looks who does.
class Held final : public Claimant {
 public:
  Held(const Claimant& whose, Doing doing) : whose_(&whose), doing_(doing) {}
  Held(Extent extent, Doing doing) : own_(std::move(extent)), doing_(doing) {}
  ~Held() = default;
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  void enter() {
    TORCH_CHECK(!claim_, "claim: it is held already");
    claim_.emplace(true, *this, doing_);
  }
  void leave() { claim_.reset(); }

  const Extent& extent() const override { return whose_ != nullptr ? whose_->extent() : own_; }

 private:
  const Claimant* whose_ = nullptr;
  Extent own_;
  Doing doing_;
  std::optional<Claim> claim_;
};

struct ClaimObject {
  PyObject base;
  PyObject* owner;  // of the claimant, or null
  Held* held;       // null as long as it is being made
};

ClaimObject* claim(PyObject* self) { return reinterpret_cast<ClaimObject*>(self); }

PyTypeObject* claim_type = nullptr;

Doing doing_of(const std::string& name) {
  if (name == "write") return Doing::Write;
  if (name == "compare") return Doing::Compare;
  if (name == "exchange") return Doing::Exchange;
  TORCH_CHECK_VALUE(false, "claim: got '", name, "', expected 'write', 'compare' or 'exchange'");
}

std::vector<at::Tensor> tensors(const char* side, PyObject* list) {
  py::detail::make_caster<std::vector<at::Tensor>> caster;
  TORCH_CHECK_TYPE(caster.load(list, true), "Claim: ", side, ": expected a list of tensors, got ",
                   Py_TYPE(list)->tp_name);
  return std::move(py::detail::cast_op<std::vector<at::Tensor>&>(caster));
}

PyObject* claim_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  static char dsts_name[] = "dsts", srcs_name[] = "srcs", doing_name[] = "doing";
  static char* names[] = {dsts_name, srcs_name, doing_name, nullptr};
  PyObject *dsts = nullptr, *srcs = nullptr;
  const char* doing = "write";
  if (PyArg_ParseTupleAndKeywords(args, kwargs, "OO|s:Claim", names, &dsts, &srcs, &doing) == 0) return nullptr;
  auto self = py::reinterpret_steal<py::object>(type->tp_alloc(type, 0));
  if (!self) throw python_error();
  claim(self.ptr())->held =
      new Held(Extent{ranges_of(tensors("dsts", dsts)), ranges_of(tensors("srcs", srcs))}, doing_of(doing));
  return self.release().ptr();
  END_HANDLE_TH_ERRORS
}

void claim_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete claim(self)->held;
  Py_XDECREF(claim(self)->owner);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* claim_enter(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  claim(self)->held->enter();
  return Py_NewRef(self);
  END_HANDLE_TH_ERRORS
}

PyObject* claim_exit(PyObject* self, PyObject* const*, Py_ssize_t) {
  claim(self)->held->leave();
  Py_RETURN_NONE;
}

PyMethodDef claim_methods[] = {
    {"__enter__", claim_enter, METH_NOARGS, "Waits for those before it. Raises PlanError."},
    {"__exit__", fast_call<claim_exit>(), METH_FASTCALL, "Lets those after it go on."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyObject* claim_of(PyObject* owner, const Claimant& claimant, const std::string& doing) {
  auto self = py::reinterpret_steal<py::object>(claim_type->tp_alloc(claim_type, 0));
  if (!self) throw py::error_already_set();
  claim(self.ptr())->held = new Held(claimant, doing_of(doing));
  Py_INCREF(owner);
  claim(self.ptr())->owner = owner;
  return self.release().ptr();
}

void add_claim(PyObject* module) {
  PyType_Slot slots[] = {
      {Py_tp_new, slot(claim_new)},
      {Py_tp_dealloc, slot(claim_dealloc)},
      {Py_tp_methods, claim_methods},
      {0, nullptr},
  };
  PyType_Spec spec = {"paramkit._C.Claim", sizeof(ClaimObject), 0, Py_TPFLAGS_DEFAULT, slots};
  claim_type = make_type(spec);
  if (PyModule_AddObjectRef(module, "Claim", reinterpret_cast<PyObject*>(claim_type)) != 0) throw python_error();
}

}  // namespace paramkit
