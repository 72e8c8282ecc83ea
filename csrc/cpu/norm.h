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
};

// Squared norm of each row over all tensors: rounded up, not below the smallest normal float, Inf for NaN.
void grad_norm_sq(const std::vector<Tensor>& tensors, int64_t rows, float* out, int threads);

}  // namespace adamix
