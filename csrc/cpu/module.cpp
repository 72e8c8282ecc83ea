// Python bindings of the CPU kernels: raw pointers in and out, so that one binary serves every torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "bind.h"
#include "clip.h"
#include "grid.h"
#include "isa.h"
#include "noise.h"
#include "norm.h"
#include "quantile.h"

namespace py = pybind11;
using adamix::DType;
using adamix::Isa;

void bind_layers(py::module_& m);

namespace {

// Address of the rows, columns, dtype, address of the sum, offset of its noise.
using PartArgs = std::tuple<uintptr_t, int64_t, DType, uintptr_t, uint64_t>;

std::vector<adamix::Part> describe(const std::vector<PartArgs>& parts) {
  std::vector<adamix::Part> described;
  for (const auto& [data, cols, dtype, out, offset] : parts)
    described.push_back({{reinterpret_cast<const void*>(data), cols, dtype}, reinterpret_cast<void*>(out), offset});
  return described;
}

}  // namespace

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
      "clip_coef",
      [](uintptr_t norm_sq, DType dtype, double threshold, int64_t rows, uintptr_t out) {
        py::gil_scoped_release release;
        const auto values = adamix::widened(reinterpret_cast<const void*>(norm_sq), dtype, rows);
        adamix::clip_coef(values.data(), rows, threshold, reinterpret_cast<float*>(out));
      },
      py::arg("norm_sq"), py::arg("dtype"), py::arg("threshold"), py::arg("rows"), py::arg("out"));
  m.def(
      "norm_quantile",
      [](uintptr_t norm_sq, DType dtype, int64_t count, int64_t rank) {
        py::gil_scoped_release release;
        std::vector<double> values = adamix::widened(reinterpret_cast<const void*>(norm_sq), dtype, count);
        return adamix::norm_quantile(values, rank);
      },
      py::arg("norm_sq"), py::arg("dtype"), py::arg("count"), py::arg("rank"));
  m.def(
      "clip_sum",
      [](const std::vector<PartArgs>& parts, int64_t rows, uintptr_t coef, DType dtype, int threads) {
        const std::vector<adamix::Part> described = describe(parts);
        py::gil_scoped_release release;
        adamix::clip_sum(described, adamix::widened(reinterpret_cast<const void*>(coef), dtype, rows), threads);
      },
      py::arg("parts"), py::arg("rows"), py::arg("coef"), py::arg("dtype"), py::arg("threads"));
  m.def(
      "clip_sum_noise",
      [](const std::vector<PartArgs>& parts, int64_t rows, double threshold, uintptr_t norm_sq,
         const std::vector<uint32_t>& key, uint64_t draw, double std, int threads, int64_t cache) {
        const std::vector<adamix::Part> described = describe(parts);
        const adamix::Noise noise{key, draw, std};
        if (std != 0) noise.check();
        py::gil_scoped_release release;
        adamix::clip_sum_noise(described, rows, threshold, reinterpret_cast<float*>(norm_sq),
                               std != 0 ? &noise : nullptr, threads, cache);
      },
      py::arg("parts"), py::arg("rows"), py::arg("threshold"), py::arg("norm_sq"), py::arg("key"), py::arg("draw"),
      py::arg("std"), py::arg("threads"), py::arg("cache"));
  m.def(
      "add_gaussian_noise",
      // For each part its address, type, elements and offset in the draw.
      [](const std::vector<std::tuple<uintptr_t, DType, int64_t, uint64_t>>& parts, double std,
         const std::vector<uint32_t>& key, uint64_t draw, int threads) {
        py::gil_scoped_release release;
        for (const auto& [data, dtype, n, offset] : parts)
          adamix::add_gaussian_noise(reinterpret_cast<void*>(data), dtype, n, {key, draw, std}, offset, threads);
      },
      py::arg("parts"), py::arg("std"), py::arg("key"), py::arg("draw"), py::arg("threads"));
  m.def(
      "grid_clip_sum",
      // For each part its rows' address, columns and type, and the address of the sum.
      [](const std::vector<std::tuple<uintptr_t, int64_t, DType, uintptr_t>>& parts, const std::vector<double>& factors,
         int64_t largest, uint64_t most, int threads) {
        std::vector<adamix::GridPart> described;
        for (const auto& [data, cols, dtype, out] : parts)
          described.push_back({{reinterpret_cast<const void*>(data), cols, dtype}, reinterpret_cast<int64_t*>(out)});
        py::gil_scoped_release release;
        adamix::grid_clip_sum(described, factors, largest, most, threads);
      },
      py::arg("parts"), py::arg("factors"), py::arg("largest"), py::arg("most"), py::arg("threads"));
  m.def(
      "grid_release",
      // For each part the address of its sums, elements, offset in the draw, and the address of the result.
      [](const std::vector<std::tuple<uintptr_t, int64_t, uint64_t, uintptr_t>>& parts,
         const std::vector<uint32_t>& key, uint64_t draw, double std, float grid, int threads) {
        const adamix::Noise noise{key, draw, std};
        if (std != 0) noise.check();
        py::gil_scoped_release release;
        for (const auto& [sums, n, offset, out] : parts)
          adamix::grid_release(reinterpret_cast<const int64_t*>(sums), n, std != 0 ? &noise : nullptr, offset, grid,
                               reinterpret_cast<float*>(out), threads);
      },
      py::arg("parts"), py::arg("key"), py::arg("draw"), py::arg("std"), py::arg("grid"), py::arg("threads"));
  adamix::bind_factored(m);
  bind_layers(m);
}
