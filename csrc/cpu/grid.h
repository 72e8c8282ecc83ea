#pragma once

#include <cstdint>
#include <vector>

#include "noise.h"
#include "norm.h"

namespace adamix {

// Rows to sum, and where the sum of their whole numbers goes.
struct GridPart : Tensor {
  int64_t* out;
};

// out[c] = sum over b of data[b, c] * factors[b] rounded toward zero, over those rows whose whole numbers are at most
// `largest` < 2^25 and have a squared norm of at most `most` < 2^50; a row with a NaN or Inf is none of them.
void grid_clip_sum(const std::vector<GridPart>& parts, const std::vector<double>& factors, int64_t largest,
                   uint64_t most, int threads);

// out[i] = (sums[i] + the nearest whole number to noise->std times its normal) * grid; null adds no noise.
void grid_release(const int64_t* sums, int64_t n, const Noise* noise, uint64_t offset, float grid, float* out,
                  int threads);

}  // namespace adamix
