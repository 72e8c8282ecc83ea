// Python bindings of the kernels for layers whose gradients are never formed.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "convert.h"
#include "embedding.h"
#include "scale_shift.h"

namespace py = pybind11;
using adamix::DType;

namespace {

adamix::Lookups lookups(uintptr_t ids, uintptr_t backprops, DType dtype, int64_t samples, int64_t positions,
                        int64_t cols, std::optional<int64_t> padding) {
  return {reinterpret_cast<const int64_t*>(ids),
          {reinterpret_cast<const void*>(backprops), cols, dtype},
          samples,
          positions,
          padding};
}

adamix::Scaled scaled(uintptr_t activations, uintptr_t backprops, DType dtype, int64_t samples, int64_t positions,
                      int64_t cols, bool channels_first) {
  return {reinterpret_cast<const void*>(activations),
          reinterpret_cast<const void*>(backprops),
          dtype,
          samples,
          positions,
          cols,
          channels_first};
}

}  // namespace

void bind_layers(py::module_& m) {
  m.def(
      "embedding_norm_sq",
      [](uintptr_t ids, uintptr_t backprops, DType dtype, int64_t samples, int64_t positions, int64_t cols,
         std::optional<int64_t> padding, uintptr_t out, int threads) {
        py::gil_scoped_release release;
        adamix::embedding_norm_sq(lookups(ids, backprops, dtype, samples, positions, cols, padding),
                                  reinterpret_cast<float*>(out), threads);
      },
      py::arg("ids"), py::arg("backprops"), py::arg("dtype"), py::arg("samples"), py::arg("positions"), py::arg("cols"),
      py::arg("padding"), py::arg("out"), py::arg("threads"));
  m.def(
      "embedding_clip_sum",
      [](uintptr_t ids, uintptr_t backprops, DType dtype, int64_t samples, int64_t positions, int64_t cols,
         std::optional<int64_t> padding, uintptr_t coef, DType coef_dtype, int64_t rows, uintptr_t out, int threads) {
        py::gil_scoped_release release;
        adamix::embedding_clip_sum(lookups(ids, backprops, dtype, samples, positions, cols, padding),
                                   adamix::widened(reinterpret_cast<const void*>(coef), coef_dtype, samples), rows,
                                   reinterpret_cast<void*>(out), threads);
      },
      py::arg("ids"), py::arg("backprops"), py::arg("dtype"), py::arg("samples"), py::arg("positions"), py::arg("cols"),
      py::arg("padding"), py::arg("coef"), py::arg("coef_dtype"), py::arg("rows"), py::arg("out"), py::arg("threads"));
  m.def(
      "scale_shift_norm_sq",
      [](uintptr_t activations, uintptr_t backprops, DType dtype, int64_t samples, int64_t positions, int64_t cols,
         bool channels_first, bool bias, uintptr_t out, int threads) {
        py::gil_scoped_release release;
        adamix::scale_shift_norm_sq(scaled(activations, backprops, dtype, samples, positions, cols, channels_first),
                                    bias, reinterpret_cast<float*>(out), threads);
      },
      py::arg("activations"), py::arg("backprops"), py::arg("dtype"), py::arg("samples"), py::arg("positions"),
      py::arg("cols"), py::arg("channels_first"), py::arg("bias"), py::arg("out"), py::arg("threads"));
  m.def(
      "scale_shift_clip_sum",
      [](uintptr_t activations, uintptr_t backprops, DType dtype, int64_t samples, int64_t positions, int64_t cols,
         bool channels_first, uintptr_t coef, DType coef_dtype, uintptr_t weight, uintptr_t bias, int threads) {
        py::gil_scoped_release release;
        adamix::scale_shift_clip_sum(scaled(activations, backprops, dtype, samples, positions, cols, channels_first),
                                     adamix::widened(reinterpret_cast<const void*>(coef), coef_dtype, samples),
                                     reinterpret_cast<void*>(weight), reinterpret_cast<void*>(bias), threads);
      },
      py::arg("activations"), py::arg("backprops"), py::arg("dtype"), py::arg("samples"), py::arg("positions"),
      py::arg("cols"), py::arg("channels_first"), py::arg("coef"), py::arg("coef_dtype"), py::arg("weight"),
      py::arg("bias"), py::arg("threads"));
}
