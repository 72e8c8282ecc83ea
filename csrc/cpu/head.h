#pragma once

#include <cstdint>

#include "factored.h"

namespace adamix {

// A softmax classifier on features [rows, inputs]: float32 weights [outputs, inputs] and, unless null, bias [outputs].
struct Head {
  const void* features;
  DType dtype;
  const int64_t* labels;
  int64_t rows, inputs, outputs;
  const float *weight, *bias;
};

// Writes the sums of clipped gradients with their noise, unless null, of the weight and then of the bias; the squared
// norms before clipping; and returns the sum of the losses of the rows that count. `threshold` may be infinite.
double head_clip_sum_noise(const Head& head, double threshold, float* weight_sum, float* bias_sum, float* norm_sq,
                           const Noise* noise, int threads);

// out[n][k] = <gradient of row n, basis k>, for a float32 basis [rank, outputs * inputs (+ outputs with a bias)].
void head_coordinates(const Head& head, const float* basis, int64_t rank, float* out, int threads);

}  // namespace adamix
