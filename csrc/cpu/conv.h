// The factors of a convolution's gradient: for each output position the window of inputs it sees, and its backprops. A
// channel group of a sample counts as a sample of its own.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "source.h"

namespace adamix {

// One to three spatial axes; those that are missing are of size 1.
struct ConvShape {
  using Axes = std::array<int64_t, 3>;
  int64_t inputs, outputs, groups;  // channels
  Axes size, out, kernel, stride, before, dilation;

  int64_t positions() const { return out[0] * out[1] * out[2]; }
  int64_t window() const { return inputs / groups * kernel[0] * kernel[1] * kernel[2]; }
};

// Which of the groups a source shows: all, sample by sample, or one.
struct Groups {
  int64_t first, count;
};

class Windows final : public Source {
 public:
  Windows(const void* data, DType dtype, const ConvShape& shape, Groups groups);
  void read(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
            int64_t stride) const override;

 private:
  // Where a column's number lies, from the corner of a window on.
  struct Column {
    int64_t offset;
    ConvShape::Axes shift;
  };

  template <class T>
  void read_as(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
               int64_t stride) const;

  const void* data_;
  DType dtype_;
  ConvShape shape_;
  Groups groups_;
  std::vector<Column> columns_;
  std::vector<int64_t> offsets_;
};

// Backprops [samples, outputs, positions], seen with the channels of a group as columns.
class Channels final : public Source {
 public:
  Channels(const void* data, DType dtype, const ConvShape& shape, Groups groups)
      : Source(shape.outputs / shape.groups),
        tensor_{data, shape.positions(), dtype},
        all_(shape.groups),
        groups_(groups) {}
  void read(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
            int64_t stride) const override;

 private:
  Tensor tensor_;
  int64_t all_;
  Groups groups_;
};

}  // namespace adamix
