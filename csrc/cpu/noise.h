#pragma once

#include <cstdint>
#include <vector>

#include "convert.h"

namespace adamix {

// One draw of normals. ChaCha20 for a key of 8 words, Philox4x32-10 for one of 2; see adamix_kernels/ops/noise.py for
// the mapping.
struct Noise {
  std::vector<uint32_t> key;
  uint64_t draw;
  double std;

  bool secure() const { return key.size() == 8; }
  // Raises std::invalid_argument for a key of another size.
  void check() const;
  // Standard normals first .. first + n of the draw; on the calling thread.
  void normals(uint64_t first, int64_t n, double* z) const;
};

// Adds std times the normals offset, offset + 1, ... of a draw to `n` contiguous elements, float32 or float64.
void add_gaussian_noise(void* data, DType dtype, int64_t n, const Noise& noise, uint64_t offset, int threads);

}  // namespace adamix
