// Python bindings of the CPU kernels: raw pointers in and out, so that one binary serves every torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "isa.h"
#include "norm.h"

namespace py = pybind11;
using adamix::DType;
using adamix::Isa;

PYBIND11_MODULE(_cpu, m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .value("float64", DType::kFloat64);
  py::enum_<Isa>(m, "Isa").value("portable", Isa::kPortable).value("avx2", Isa::kAvx2).value("avx512", Isa::kAvx512);
  m.def("best_isa", &adamix::best_isa);
  m.def("use_isa", [](Isa isa) {
    if (isa > adamix::best_isa()) throw std::invalid_argument("isa: this processor does not have it");
    adamix::current_isa() = isa;
  });
  m.def(
      "grad_norm_sq",
      [](const std::vector<std::tuple<uintptr_t, int64_t, DType>>& parts, int64_t rows, uintptr_t out, int threads) {
        std::vector<adamix::Tensor> tensors;
        for (const auto& [data, cols, dtype] : parts)
          tensors.push_back({reinterpret_cast<const void*>(data), cols, dtype});
        py::gil_scoped_release release;
        adamix::grad_norm_sq(tensors, rows, reinterpret_cast<float*>(out), threads);
      },
      py::arg("parts"), py::arg("rows"), py::arg("out"), py::arg("threads"));
}
