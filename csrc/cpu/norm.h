#pragma once

#include <cstdint>
#include <vector>

namespace adamix {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Rows of `cols` elements, contiguous.
struct Tensor {
  const void* data;
  int64_t cols;
  DType dtype;
};

void grad_norm_sq(const std::vector<Tensor>& tensors, int64_t rows, float* out, int threads);

}  // namespace adamix
