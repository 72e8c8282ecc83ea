#pragma once

#include <cstdint>
#include <vector>

#include "convert.h"

namespace adamix {

// Adds std times the normals offset, offset + 1, ... of a draw to `n` contiguous elements, float32 or float64. The
// stream is ChaCha20 for a key of 8 words, Philox4x32-10 for one of 2; see adamix_kernels/ops/noise.py for the mapping.
void add_gaussian_noise(void* data, DType dtype, int64_t n, double std, const std::vector<uint32_t>& key, uint64_t draw,
                        uint64_t offset, int threads);

}  // namespace adamix
