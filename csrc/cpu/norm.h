#pragma once

#include <cstdint>
#include <vector>

#include "convert.h"

namespace adamix {

// Rows of `cols` elements, contiguous.
struct Tensor {
  const void* data;
  int64_t cols;
  DType dtype;

  const void* at(int64_t row, int64_t col) const {
    return static_cast<const char*>(data) + (row * cols + col) * size_of(dtype);
  }
};

// Squared norm of each row over all tensors: rounded up, not below the smallest normal float, Inf for NaN.
void grad_norm_sq(const std::vector<Tensor>& tensors, int64_t rows, float* out, int threads);

// Sum of squares of `size` elements in double, for the type and this processor.
using SumSq = double (*)(const void* x, int64_t size);
SumSq sum_sq_of(DType dtype);

// The floats at or above sums of `terms` squares made by `SumSq` and added up in double.
float round_up(double sum, int64_t terms);
void round_up(const std::vector<double>& sums, int64_t terms, float* out);

}  // namespace adamix
