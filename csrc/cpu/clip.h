#pragma once

#include <cstdint>

#include "convert.h"

namespace adamix {

// out[c] = sum over b of coef[b] data[b, c], for contiguous data [rows, cols]; rows with coef 0 are not read. `out` is
// float64 where the data are, else float32.
void clip_sum(const void* data, DType dtype, int64_t rows, int64_t cols, const double* coef, void* out, int threads);

}  // namespace adamix
