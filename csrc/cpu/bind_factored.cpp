// Python bindings of the kernels on factored gradients.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "bind.h"
#include "conv.h"
#include "factored.h"
#include "head.h"

namespace py = pybind11;

namespace adamix {
namespace {

Dense dense(const Address& tensor, int64_t positions, int64_t columns) {
  return Dense(reinterpret_cast<const void*>(tensor.first), tensor.second, positions, columns);
}

// Key, draw and standard deviation.
using NoiseArgs = std::optional<std::tuple<std::vector<uint32_t>, uint64_t, double>>;

std::optional<Noise> noise_of(const NoiseArgs& given) {
  if (!given) return std::nullopt;
  const Noise noise{std::get<0>(*given), std::get<1>(*given), std::get<2>(*given)};
  noise.check();
  return noise;
}

void linear_norm_sq(Address activations, Address backprops, int64_t samples, int64_t positions, int64_t inputs,
                    int64_t outputs, bool bias, bool gram, uintptr_t out, int threads) {
  const Dense a = dense(activations, positions, inputs), g = dense(backprops, positions, outputs);
  const std::vector<double> norms = factored_norm_sq({a, g, samples, positions}, bias, gram, threads);
  round_up(norms, outputs * (inputs + 1) + 4 * positions + 64, reinterpret_cast<float*>(out));
}

void linear_clip_sum(Address activations, Address backprops, Address coef, int64_t samples, int64_t positions,
                     int64_t inputs, int64_t outputs, uintptr_t weight, uintptr_t bias, const NoiseArgs& noise,
                     int threads) {
  const std::optional<Noise> draw = noise_of(noise);
  const Noise* source = draw ? &*draw : nullptr;
  const Dense a = dense(activations, positions, inputs), g = dense(backprops, positions, outputs);
  const Factors factors{a, g, samples, positions};
  const std::vector<double> scales = widened(reinterpret_cast<const void*>(coef.first), coef.second, samples);
  factored_sum(factors, scales, reinterpret_cast<float*>(weight), source, 0, threads);
  if (bias != 0) bias_sum(factors, scales, reinterpret_cast<float*>(bias), source, outputs * inputs, threads);
}

// Channels in and out and groups; then per axis sizes in and out, kernel, stride, padding before, dilation.
using ConvArgs = std::tuple<int64_t, int64_t, int64_t, ConvShape::Axes, ConvShape::Axes, ConvShape::Axes,
                            ConvShape::Axes, ConvShape::Axes, ConvShape::Axes>;

ConvShape shape_of(const ConvArgs& args) {
  return std::apply([](const auto&... arg) { return ConvShape{arg...}; }, args);
}

void conv_norm_sq(Address activations, Address backprops, int64_t samples, const ConvArgs& args, bool bias, bool gram,
                  uintptr_t out, int threads) {
  const ConvShape shape = shape_of(args);
  const int64_t outputs = shape.outputs / shape.groups;
  // Gradients written out cost less than their multiplications tell: `gram` must be clearly cheaper.
  const bool far = 2 * shape.positions() * (shape.window() + outputs) < shape.window() * outputs;
  if (by_samples(shape) && !(gram && far))
    return conv_norm_sq_by_samples(reinterpret_cast<const void*>(activations.first), activations.second,
                                   reinterpret_cast<const void*>(backprops.first), backprops.second, samples, shape,
                                   bias, reinterpret_cast<float*>(out), threads);
  const Groups all{0, shape.groups};
  const Windows a(reinterpret_cast<const void*>(activations.first), activations.second, shape, all);
  const Channels g(reinterpret_cast<const void*>(backprops.first), backprops.second, shape, all);
  const std::vector<double> parts =
      factored_norm_sq({a, g, samples * shape.groups, shape.positions()}, bias, gram, threads);
  std::vector<double> norms(samples);
  for (size_t k = 0; k < parts.size(); ++k) norms[k / shape.groups] += parts[k];
  round_up(norms, norm_terms(shape), reinterpret_cast<float*>(out));
}

void conv_clip_sum(Address activations, Address backprops, Address coef, int64_t samples, const ConvArgs& args,
                   uintptr_t weight, uintptr_t bias, int threads) {
  const ConvShape shape = shape_of(args);
  const std::vector<double> scales = widened(reinterpret_cast<const void*>(coef.first), coef.second, samples);
  if (by_samples(shape))
    return conv_clip_sum_by_samples(reinterpret_cast<const void*>(activations.first), activations.second,
                                    reinterpret_cast<const void*>(backprops.first), backprops.second, scales, shape,
                                    reinterpret_cast<float*>(weight), reinterpret_cast<float*>(bias), threads);
  const int64_t outputs = shape.outputs / shape.groups;
  for (int64_t group = 0; group < shape.groups; ++group) {
    const Groups one{group, 1};
    const Windows a(reinterpret_cast<const void*>(activations.first), activations.second, shape, one);
    const Channels g(reinterpret_cast<const void*>(backprops.first), backprops.second, shape, one);
    const Factors factors{a, g, samples, shape.positions()};
    factored_sum(factors, scales, reinterpret_cast<float*>(weight) + group * outputs * shape.window(), nullptr, 0,
                 threads);
    if (bias != 0) bias_sum(factors, scales, reinterpret_cast<float*>(bias) + group * outputs, nullptr, 0, threads);
  }
}

void conv_joined(Address activations, Address backprops, const std::vector<Address>& others, int64_t samples,
                 const ConvArgs& args, double threshold, uintptr_t norm_sq, uintptr_t weight, uintptr_t bias,
                 int threads) {
  std::vector<double> norms(samples);
  for (const Address& part : others) {
    const std::vector<double> values = widened(reinterpret_cast<const void*>(part.first), part.second, samples);
    for (int64_t b = 0; b < samples; ++b) norms[b] += values[b];
  }
  conv_clip_sum_joined(reinterpret_cast<const void*>(activations.first), activations.second,
                       reinterpret_cast<const void*>(backprops.first), backprops.second, norms, threshold,
                       shape_of(args), reinterpret_cast<float*>(weight), reinterpret_cast<float*>(bias), threads);
  std::copy(norms.begin(), norms.end(), reinterpret_cast<double*>(norm_sq));
}

void conv_grads(Address activations, Address backprops, int64_t samples, const ConvArgs& args, uintptr_t weight,
                uintptr_t bias, int threads) {
  conv_grad_sample(reinterpret_cast<const void*>(activations.first), activations.second,
                   reinterpret_cast<const void*>(backprops.first), backprops.second, samples, shape_of(args),
                   reinterpret_cast<float*>(weight), reinterpret_cast<float*>(bias), threads);
}

const float* floats(uintptr_t data) { return reinterpret_cast<const float*>(data); }

Head head_of(Address features, uintptr_t labels, uintptr_t weight, uintptr_t bias, int64_t rows, int64_t inputs,
             int64_t outputs) {
  return {reinterpret_cast<const void*>(features.first),
          features.second,
          reinterpret_cast<const int64_t*>(labels),
          rows,
          inputs,
          outputs,
          floats(weight),
          floats(bias)};
}

double softmax_head(Address features, uintptr_t labels, uintptr_t weight, uintptr_t bias, int64_t rows, int64_t inputs,
                    int64_t outputs, double threshold, uintptr_t weight_sum, uintptr_t bias_sum, uintptr_t norm_sq,
                    const NoiseArgs& noise, int threads) {
  const std::optional<Noise> draw = noise_of(noise);
  return head_clip_sum_noise(head_of(features, labels, weight, bias, rows, inputs, outputs), threshold,
                             reinterpret_cast<float*>(weight_sum), reinterpret_cast<float*>(bias_sum),
                             reinterpret_cast<float*>(norm_sq), draw ? &*draw : nullptr, threads);
}

void softmax_head_coordinates(Address features, uintptr_t labels, uintptr_t weight, uintptr_t bias, int64_t rows,
                              int64_t inputs, int64_t outputs, uintptr_t basis, int64_t rank, uintptr_t out,
                              int threads) {
  head_coordinates(head_of(features, labels, weight, bias, rows, inputs, outputs), floats(basis), rank,
                   reinterpret_cast<float*>(out), threads);
}

}  // namespace

void bind_factored(py::module_& m) {
  m.def("linear_norm_sq", &linear_norm_sq, py::call_guard<py::gil_scoped_release>());
  m.def("linear_clip_sum", &linear_clip_sum, py::call_guard<py::gil_scoped_release>());
  m.def("conv_norm_sq", &conv_norm_sq, py::call_guard<py::gil_scoped_release>());
  m.def("conv_grad_sample", &conv_grads, py::call_guard<py::gil_scoped_release>());
  m.def("conv_clip_sum", &conv_clip_sum, py::call_guard<py::gil_scoped_release>());
  m.def("conv_norm_clip_sum", &conv_joined, py::call_guard<py::gil_scoped_release>());
  m.def("conv_by_samples", [](const ConvArgs& args) { return by_samples(shape_of(args)); });
  m.def("softmax_head", &softmax_head, py::call_guard<py::gil_scoped_release>());
  m.def("softmax_head_coordinates", &softmax_head_coordinates, py::call_guard<py::gil_scoped_release>());
}

}  // namespace adamix
