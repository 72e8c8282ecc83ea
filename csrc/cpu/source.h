// Where the rows of a factor come from: activations or backprops, one row per position of a sample.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "convert.h"
#include "norm.h"

namespace adamix {

class Source {
 public:
  explicit Source(int64_t columns) : columns(columns) {}
  virtual ~Source() = default;

  // Columns first .. first + count of `rows` positions of a sample as float32, `stride` apart.
  virtual void read(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
                    int64_t stride) const = 0;
  // Where a position's columns lie as float32 in memory, with the next position `stride` on; null if they do not.
  virtual const float* in_place(int64_t, int64_t, int64_t, int64_t&) const { return nullptr; }
  // The squared norms of `rows` positions' rows.
  virtual void squares(int64_t sample, int64_t position, int64_t rows, double* out) const;

  const int64_t columns;
};

// Copies n numbers as float32.
using ToFloat = void (*)(const void* x, int64_t n, float* out);
ToFloat to_float_of(DType dtype);

// A tensor [samples, positions, columns] as it lies in memory.
class Dense final : public Source {
 public:
  Dense(const void* data, DType dtype, int64_t positions, int64_t columns)
      : Source(columns),
        rows_{data, columns, dtype},
        positions_(positions),
        convert_(to_float_of(dtype)),
        sum_sq_(sum_sq_of(dtype)) {}

  void read(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
            int64_t stride) const override {
    for (int64_t r = 0; r < rows; ++r, out += stride) convert_(at(sample, position + r, first), count, out);
  }
  const float* in_place(int64_t sample, int64_t position, int64_t first, int64_t& stride) const override {
    stride = columns;
    return rows_.dtype == DType::kFloat32 ? static_cast<const float*>(at(sample, position, first)) : nullptr;
  }
  void squares(int64_t sample, int64_t position, int64_t rows, double* out) const override {
    for (int64_t r = 0; r < rows; ++r) out[r] = sum_sq_(at(sample, position + r, 0), columns);
  }

 private:
  const void* at(int64_t sample, int64_t position, int64_t first) const {
    return rows_.at(sample * positions_ + position, first);
  }

  Tensor rows_;
  int64_t positions_;
  ToFloat convert_;
  SumSq sum_sq_;
};

}  // namespace adamix
