#pragma once

#include <cstdint>
#include <vector>

#include "noise.h"
#include "norm.h"

namespace adamix {

// Rows to sum, and where their sum goes: float64 where the rows are, else float32. `offset` is the part's place in the
// list as one vector, which its noise follows.
struct Part : Tensor {
  void* out;
  uint64_t offset;
};

// coef[b] = min(1, threshold / sqrt(norm_sq[b])) as a float not above it; 0 where norm_sq is not finite or the factor
// below the smallest normal float.
void clip_coef(const double* norm_sq, int64_t rows, double threshold, float* coef);

// out[c] = sum over b of coef[b] data[b, c]; rows whose coef is not above 0 are not read.
void clip_sum(const std::vector<Part>& parts, const std::vector<double>& coef, int threads);

// total[i] += coef[r] rows[r][i], one row after the other, for the type and this processor.
using Add = void (*)(const void* const* rows, const double* coef, int64_t count, double* total, int64_t n);
Add add_of(DType dtype);

// Norms, factors, weighted sum and, unless null, noise of standard deviation noise->std. `cache` is the size of
// the processor's last cache in bytes.
void clip_sum_noise(const std::vector<Part>& parts, int64_t rows, double threshold, float* norm_sq, const Noise* noise,
                    int threads, int64_t cache);

// Writes `size` sums from element `start` of a part on, with their noise unless null, rounded once. `total` may lie
// where they go.
void finish(const Part& part, int64_t start, int64_t size, const double* total, const Noise* noise);

}  // namespace adamix
