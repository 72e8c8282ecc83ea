// Blocks of a product of two factors, g^T a, from packed panels: what norms and sums of factored gradients share.
#pragma once

#include <cstdint>
#include <vector>

#include "micro.h"
#include "source.h"

namespace adamix {

// Positions in one float32 chain; longer sums are continued in double.
constexpr int64_t kDepth = 128;

inline int64_t round_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Positions first .. first + rows of all samples one after the other, as Source::read.
void read_flat(const Source& source, int64_t positions, int64_t first, int64_t rows, int64_t column, int64_t count,
               float* out, int64_t stride);

// Outputs outer .. outer + tall by inputs inner .. inner + wide of a gradient. In memory a row has `stride` doubles,
// and both sizes are rounded up to whole tiles.
struct Region {
  int64_t outer, tall, inner, wide;

  int64_t stride() const { return round_to(wide, kWide); }
  int64_t size() const { return round_to(tall, kTall) * stride(); }
};

// Panels of up to kDepth positions of both factors, and their product. A thread has one of its own. Products of at most
// kNarrow numbers, a depthwise convolution's, would waste the tiles: they are made one by one.
class Panels {
 public:
  // Packs backprops, each position times its factor unless null. What has factor 0 becomes 0.
  void pack_tall(const Source& source, int64_t positions, int64_t first, int64_t rows, int64_t column, int64_t count,
                 const double* factors);
  // Then packs activations, each position times its factor, a power of 2, unless null; 0 where `kept`, if any, is 0.
  void pack_wide(const Source& source, int64_t positions, int64_t first, int64_t rows, int64_t column, int64_t count,
                 const float* factors, const double* kept);
  // Adds the product of what was packed to a region's doubles.
  void add(double* total, int64_t stride) const;
  // The sum of squares of the product.
  double square() const;

 private:
  static constexpr int64_t kNarrow = 64;
  void add_narrow(double* total, int64_t stride) const;

  int64_t rows_ = 0, outputs_ = 0, tall_ = 0, inputs_ = 0, wide_ = 0;
  bool narrow_ = false;
  std::vector<float> tall_panels_, wide_panels_, row_;
};

// Columns in one `dot`; longer sums are continued in double. Two blocks of rows lie in the second-level cache.
constexpr int64_t kDotDepth = 768;

// Rows as `dot` takes them: where they lie in memory, or a copy, scaled, with zeros up to whole vectors. The last is
// repeated until their number is a multiple of `unit`.
class DotRows {
 public:
  void find(const Source& source, float scale, int64_t sample, int64_t position, int64_t count, int64_t first,
            int64_t columns, int64_t unit);
  const float* const* at(int64_t row) const { return rows_.data() + row; }

 private:
  std::vector<float> copy_;
  std::vector<const float*> rows_;
};

// The sum of squares of n doubles.
double square_sum(const double* x, int64_t n);

// x += y.
void add_to(double* x, const float* y, int64_t n);

}  // namespace adamix
