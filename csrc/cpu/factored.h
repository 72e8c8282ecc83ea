#pragma once

#include <cstdint>
#include <vector>

#include "clip.h"
#include "panels.h"
#include "source.h"

namespace adamix {

// Gradients sum_t g_t a_t^T of `samples` samples with `positions` positions each.
struct Factors {
  const Source &activations, &backprops;
  int64_t samples, positions;
};

// For each sample (n + e)^2 or more: n the norm of its gradient, of a bias too if there is one, e what `_factored.py`
// calls sum_error. By positions with positions (`gram`) or inputs with outputs.
std::vector<double> factored_norm_sq(const Factors& factors, bool bias, bool gram, int threads);

// Writes [outputs, inputs] float32 sums over samples of coef[b] times the gradient, each with its noise, unless null,
// of the elements `offset` and on.
void factored_sum(const Factors& factors, const std::vector<double>& coef, float* out, const Noise* noise,
                  uint64_t offset, int threads);

// The same of the bias: [outputs].
void bias_sum(const Factors& factors, const std::vector<double>& coef, float* out, const Noise* noise, uint64_t offset,
              int threads);

// --- What the sum is made of, for callers that have more to do with a chunk of positions
// -------------------------------

// What each position is multiplied with: activations with a power of 2 that brings them near 1, backprops with the
// sample's factor and that power's inverse, so that products underflow only if they are too small to count.
struct Scales {
  std::vector<float> wide;
  std::vector<double> tall;

  explicit Scales(int64_t count) : wide(count), tall(count) {}
  Scales(const Source& activations, const std::vector<double>& coef, int64_t positions, int threads);
  // From its sample's factor and the squared norm of its activations.
  void set(int64_t position, double factor, double square);
};

// Sizes of the largest region: its doubles, 196 KiB, lie in the second-level cache.
constexpr int64_t kTallest = 96, kWidest = 256;
std::vector<Region> cut_regions(int64_t outputs, int64_t inputs, int64_t least);

// Adds to a region of the sum what `samples` samples from `first` on contribute.
void add_products(const Factors& factors, const Scales& scales, int64_t first, int64_t samples, const Region& region,
                  Panels& panels, double* total);

// Writes a region of [outputs, inputs] sums, with their noise.
void write_region(const Region& region, const double* total, int64_t inputs, float* out, const Noise* noise,
                  uint64_t offset);

}  // namespace adamix
