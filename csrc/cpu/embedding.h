#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "norm.h"

namespace adamix {

// What an embedding looked up, ids [samples, positions], and the gradients of what it found: a row of `grads` each.
struct Lookups {
  const int64_t* ids;
  Tensor grads;
  int64_t samples, positions;
  std::optional<int64_t> padding;  // the id whose positions are left out

  bool kept(int64_t row) const { return !padding || ids[row] != *padding; }
};

// Squared norm of each sample's gradient, with room for the rounding of its sum: rounded up, Inf for NaN.
void embedding_norm_sq(const Lookups& lookups, float* out, int threads);

// out [ids, cols] = the samples' gradients times coef[b], summed: float64 where the gradients are, else float32.
// Samples whose coef is not above 0 are not read.
void embedding_clip_sum(const Lookups& lookups, const std::vector<double>& coef, int64_t ids, void* out, int threads);

}  // namespace adamix
