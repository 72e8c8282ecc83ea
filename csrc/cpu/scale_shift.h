#pragma once

#include <cstdint>
#include <vector>

#include "convert.h"

namespace adamix {

// The normalised input of a layer and the gradients of its output, [samples, positions, cols] each; or, with
// `channels_first`, [samples, cols, positions].
struct Scaled {
  const void *activations, *backprops;
  DType dtype;
  int64_t samples, positions, cols;
  bool channels_first;
};

// Squared norm of each sample's gradient of the weight, and of the bias if there is one, with room for the rounding of
// its sum: rounded up, Inf for NaN.
void scale_shift_norm_sq(const Scaled& layer, bool bias, float* out, int threads);

// weight [cols], and unless null bias [cols] = the samples' gradients times coef[b], summed: float64 where the inputs
// are, else float32. Samples whose coef is not above 0 are not read.
void scale_shift_clip_sum(const Scaled& layer, const std::vector<double>& coef, void* weight, void* bias, int threads);

}  // namespace adamix
