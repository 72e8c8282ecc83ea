// Python bindings of the CPU kernels: raw pointers in and out, so that one binary serves every torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "clip.h"
#include "isa.h"
#include "noise.h"
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
  m.def(
      "clip_sum",
      [](uintptr_t data, DType dtype, int64_t rows, int64_t cols, uintptr_t coef, uintptr_t out, int threads) {
        adamix::clip_sum(reinterpret_cast<const void*>(data), dtype, rows, cols, reinterpret_cast<const double*>(coef),
                         reinterpret_cast<void*>(out), threads);
      },
      py::arg("data"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("coef"), py::arg("out"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "add_gaussian_noise",
      [](uintptr_t data, DType dtype, int64_t n, double std, const std::vector<uint32_t>& key, uint64_t draw,
         uint64_t offset, int threads) {
        adamix::add_gaussian_noise(reinterpret_cast<void*>(data), dtype, n, std, key, draw, offset, threads);
      },
      py::arg("data"), py::arg("dtype"), py::arg("n"), py::arg("std"), py::arg("key"), py::arg("draw"),
      py::arg("offset"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}
