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

// The inputs that the windows of some positions see, as float32 with zeros around: a window's numbers lie there in
// runs.
class Box {
 public:
  // Numbers of a window that lie side by side: its columns `at` and on, `offset` from the window's corner.
  struct Run {
    int64_t offset, at, count;
  };

  Box(const ConvShape& shape, int64_t position, int64_t rows);
  // Takes the inputs of so many channels, the first at `data`, into memory that is the caller's.
  template <class T>
  void fill(const T* data, int64_t channels, std::vector<float>& memory);
  // Instead reads them where they lie, and up to kSlack numbers after them. Only where no window has zeros around.
  bool inside() const;
  void view(const float* data);
  static constexpr int64_t kSlack = 16;
  // Columns of the windows: the same for every box of those positions.
  struct Columns {
    std::vector<Run> runs;
    std::vector<int64_t> offsets;  // of the runs, if they follow one another in equal length `copied`; else none
    size_t whole = 0;              // so many runs may be copied as if they had ..
    int64_t copied = 1;            // .. so many numbers
    bool in_place = false;
  };
  // Those from `first` on of the channels that were taken.
  void choose(int64_t first, int64_t count, Columns& columns) const;
  void copy(const Columns& columns, int64_t position, int64_t rows, float* out, int64_t stride) const;

 private:
  // Calls `copy` with each position's window and where it goes.
  template <class Copy>
  void each(int64_t position, int64_t rows, float* out, int64_t stride, Copy copy) const;

  const ConvShape& shape_;
  ConvShape::Axes from_, corner_, size_;  // output and input positions
  ConvShape::Axes step_;                  // from a channel, a plane and a line to the next
  const float* memory_ = nullptr;
};

class Windows final : public Source {
 public:
  Windows(const void* data, DType dtype, const ConvShape& shape, Groups groups)
      : Source(shape.window()), data_(data), dtype_(dtype), shape_(shape), groups_(groups) {}
  void read(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
            int64_t stride) const override;

 private:
  template <class T>
  void read_as(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
               int64_t stride) const;

  const void* data_;
  DType dtype_;
  ConvShape shape_;
  Groups groups_;
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

// Writes [samples, outputs, window] and, unless null, [samples, outputs]: gradients of the weight and the bias.
void conv_grad_sample(const void* activations, DType a_type, const void* backprops, DType g_type, int64_t samples,
                      const ConvShape& shape, float* weight, float* bias, int threads);

// Whether norms and sums are best made from the gradients of one sample after the other, and these.
bool by_samples(const ConvShape& shape);
void conv_norm_sq_by_samples(const void* activations, DType a_type, const void* backprops, DType g_type,
                             int64_t samples, const ConvShape& shape, bool bias, float* norm_sq, int threads);
void conv_clip_sum_by_samples(const void* activations, DType a_type, const void* backprops, DType g_type,
                              const std::vector<double>& coef, const ConvShape& shape, float* weight, float* bias,
                              int threads);
// Norms and sum in one pass: `norm_sq` comes with the squared norms of all else and leaves with those of everything.
void conv_clip_sum_joined(const void* activations, DType a_type, const void* backprops, DType g_type,
                          std::vector<double>& norm_sq, double threshold, const ConvShape& shape, float* weight,
                          float* bias, int threads);
// The terms of a squared norm, for `round_up`.
inline int64_t norm_terms(const ConvShape& s) { return s.outputs * (s.window() + 1) + 4 * s.positions() + 64; }

}  // namespace adamix
