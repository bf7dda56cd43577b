// The Python module paramkit._C.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <cerrno>

#include "core/task.h"
#include "cpu/capability.h"
#include "cpu/run.h"
#include "torch/batch.h"
#include "torch/claims.h"
#include "torch/devices.h"
#include "torch/held_claim.h"
#include "torch/load_state_dict.h"
#include "torch/patch.h"
#include "torch/plan.h"
#include "torch/python_ops.h"
#include "torch/reading.h"
#include "torch/recorder.h"
#include "torch/staging.h"
#include "torch/threads.h"

namespace py = pybind11;

namespace {

using paramkit::Plan;

std::vector<int64_t> integers(const py::handle& sequence) { return sequence.cast<std::vector<int64_t>>(); }

// A plain pointer, since pybind11 frees the object of a smart one twice if it has no memory to register it.
Plan* make_plan(std::vector<at::Tensor> dsts, std::vector<at::Tensor> srcs, const py::sequence& writes,
                const py::sequence& slots, bool follow_autograd, bool ordered) {
  std::vector<Plan::Write> all_writes;
  all_writes.reserve(py::len(writes));
  for (const py::handle item : writes) {
    const auto write = py::reinterpret_borrow<py::sequence>(item);
    all_writes.push_back({write[0].cast<int64_t>(), write[1].cast<int64_t>(), integers(write[2]), integers(write[3]),
                          write[4].cast<int64_t>(), integers(write[5]), write[6].cast<int64_t>()});
  }
  std::vector<Plan::Slot> all_slots;
  all_slots.reserve(py::len(slots));
  for (const py::handle item : slots) {
    const auto slot = py::reinterpret_borrow<py::sequence>(item);
    all_slots.push_back({slot[0], slot[1], slot[2]});
  }
  return new Plan(std::move(dsts), std::move(srcs), std::move(all_writes), std::move(all_slots), follow_autograd,
                  ordered);
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const auto* kernels : paramkit::cpu::available()) names.emplace_back(kernels->name);
  return names;
}

void set_capability(const std::string& name) {
  if (paramkit::cpu::choose(name.c_str())) return;
  std::string choices;
  for (const std::string& choice : capabilities()) choices += (choices.empty() ? "" : ", ") + choice;
  throw py::value_error("this machine cannot run the instruction set '" + name + "'; it has: " + choices);
}

py::dict routes() {
  py::dict counts;
  const paramkit::Routes& done = paramkit::routes();
  for (int f = 0; f < paramkit::kFamilies; ++f) counts[paramkit::kFamilyNames[f]] = done.families[f];
  counts["cast"] = done.casts;
  counts["native"] = done.native;
  counts["staged"] = done.staged;
  return counts;
}

void open_cuda(const std::string& path, const std::string& emulate) {
  namespace devices = paramkit::devices;
  if (emulate.empty()) return devices::open(path, devices::Emulate::No);
  if (emulate == "kernels") return devices::open(path, devices::Emulate::Kernels);
  if (emulate == "to device") return devices::open(path, devices::Emulate::ToDevice);
  if (emulate == "to host") return devices::open(path, devices::Emulate::ToHost);
  throw py::value_error("open_cuda: got '" + emulate + "', expected '', 'kernels', 'to device' or 'to host'");
}

py::dict cuda_counts() {
  const paramkit::devices::Counts counts = paramkit::devices::counts();
  py::dict result;
  result["launches"] = counts.launches;
  result["uploads"] = counts.uploads;
  result["staged_bytes"] = counts.staged_bytes;
  return result;
}

// The bytes that were read: fewer than those of all rows where the file ends before. Raises OSError.
int64_t read_file_rows(int fd, int64_t offset, int64_t file_stride, int64_t rows, int64_t row_bytes, uintptr_t address,
                       int64_t memory_stride) {
  paramkit::ReadOutcome outcome{};
  {
    const paramkit::ReleaseGil released(true);
    outcome = paramkit::read_rows(
        fd, {offset, file_stride, rows, row_bytes, reinterpret_cast<char*>(address), memory_stride});
  }
  if (outcome.error == 0) return outcome.bytes;
  errno = outcome.error;
  PyErr_SetFromErrno(PyExc_OSError);
  throw py::error_already_set();
}

// The plan of a Python object, null as long as it is being made.
Plan* plan_of(PyObject* self) {
  const auto* instance = reinterpret_cast<py::detail::instance*>(self);
  const bool made = instance->simple_layout && instance->simple_holder_constructed;
  return made ? static_cast<Plan*>(instance->simple_value_holder[0]) : nullptr;
}

int traverse_plan(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Plan* plan = plan_of(self);
  if (plan == nullptr) return 0;
  for (const Plan::Slot& slot : plan->slots()) {
    Py_VISIT(slot.table.ptr());
    Py_VISIT(slot.value.ptr());
  }
  return 0;
}

int clear_plan(PyObject* self) {
  if (Plan* plan = plan_of(self)) plan->forget_slots();
  return 0;
}

void collect_plans(PyHeapTypeObject* type) {
  type->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->ht_type.tp_traverse = traverse_plan;
  type->ht_type.tp_clear = clear_plan;
}

}  // namespace

// Needs the GIL: plans, recorders and tables have no locks of their own. A free-threaded Python turns it on.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, py::mod_gil_not_used(false)) {
  m.attr("NAME") = "cpu";
  Plan::prepare();
  paramkit::adopt_numerics();
  paramkit::prepare_load_state_dict();
  paramkit::prepare_claims();
  if (PyModule_AddFunctions(m.ptr(), paramkit::kOperators) != 0) throw py::error_already_set();
  paramkit::add_recorder(m.ptr());
  paramkit::add_claim(m.ptr());
  m.def("capability", [] { return std::string(paramkit::cpu::active().name); });
  m.def("capabilities", &capabilities);
  m.def("set_capability", &set_capability);
  m.def("routes", &routes);
  m.def("stream_bytes", &paramkit::cpu::stream_bytes);
  m.def("set_stream_bytes", [](int64_t bytes) {
    const int64_t before = paramkit::cpu::stream_bytes();
    paramkit::cpu::set_stream_bytes(bytes);
    return before;
  });
  m.def("open_cuda", &open_cuda, py::arg("path"), py::arg("emulate") = "");
  m.def("close_emulated_cuda", &paramkit::devices::close_emulated);
  m.def("enable_cuda", &paramkit::devices::enable);
  m.def("cuda_counts", &cuda_counts);
  m.def("staging_bytes", &paramkit::staging_bytes);
  m.def("set_staging_bytes", [](int64_t bytes) {
    const int64_t before = paramkit::staging_bytes();
    paramkit::set_staging_bytes(bytes);
    return before;
  });
  m.def("set_claims", &paramkit::set_claims);
  m.def("read_rows", &read_file_rows);
  m.def("patch_torch", torch::wrap_pybind_function(&paramkit::patch_torch));
  m.def("set_patch_least_bytes", &paramkit::set_patch_least_bytes);
  m.def("torch_version", [] { return std::string(TORCH_VERSION); });
  py::class_<Plan>(m, "Plan", py::custom_type_setup(collect_plans))
      .def(py::init(&make_plan))
      .def("families", &Plan::families)
      .def("replaced", &Plan::replaced)
      .def("moved", &Plan::moved)
      .def("destinations", &Plan::destinations)
      .def("sources", &Plan::sources)
      .def("writes",
           [](const Plan& plan) {
             py::list all;
             for (const Plan::Write& w : plan.writes()) {
               all.append(
                   py::make_tuple(w.dst, w.src, w.sizes, w.dst_strides, w.dst_offset, w.src_strides, w.src_offset));
             }
             return all;
           })
      .def("rebind", torch::wrap_pybind_function([](Plan& plan, const py::dict& tensors, const py::list& names) {
             return plan.rebind(tensors, names);
           }))
      .def("run",
           torch::wrap_pybind_function([](Plan& plan, const py::object& progress) { return plan.run(progress); }))
      .def("exchange", torch::wrap_pybind_function([](Plan& plan) { return plan.exchange(); }))
      .def("exchange_back", torch::wrap_pybind_function([](Plan& plan) { return plan.exchange_back(); }))
      .def("exchanges", &Plan::exchanges)
      .def("runs", &Plan::runs)
      .def(
          "claim",
          [](const py::handle& self, const std::string& doing) {
            return py::reinterpret_steal<py::object>(paramkit::claim_of(self.ptr(), self.cast<const Plan&>(), doing));
          },
          py::arg("doing") = "write")
      .def("verify", &Plan::verify);
}
