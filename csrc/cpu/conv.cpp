#include "conv.h"

#include <cstring>
#include <type_traits>

namespace adamix {

namespace {

// Copies runs of at most kMost numbers, which is faster than as many as there are: what is too much is overwritten by
// the runs that follow, and those from `whole` on are copied exactly.
template <int kMost>
void copy_runs(const std::vector<Box::Run>& runs, size_t whole, const float* window, float* out) {
  size_t k = 0;
  for (; k < whole; ++k) std::memcpy(out + runs[k].at, window + runs[k].offset, kMost * sizeof(float));
  for (; k < runs.size(); ++k) std::memcpy(out + runs[k].at, window + runs[k].offset, runs[k].count * sizeof(float));
}

// Runs of kCount numbers that follow one another.
template <int kCount>
void copy_equal(const std::vector<int64_t>& offsets, const float* window, float* out) {
  const int64_t* offset = offsets.data();
  const int64_t runs = offsets.size();
#pragma GCC unroll 8
  for (int64_t k = 0; k < runs; ++k) std::memcpy(out + k * kCount, window + offset[k], kCount * sizeof(float));
}

}  // namespace

Box::Box(const ConvShape& shape, int64_t position, int64_t rows) : shape_(shape) {
  const int64_t last = position + rows - 1, plane = shape.out[1] * shape.out[2];
  const bool one = position / plane == last / plane;
  from_ = {position / plane, one ? position / shape.out[2] % shape.out[1] : 0, 0};
  const ConvShape::Axes to{last / plane, one ? last / shape.out[2] % shape.out[1] : shape.out[1] - 1, shape.out[2] - 1};
  for (int axis = 0; axis < 3; ++axis) {
    corner_[axis] = from_[axis] * shape.stride[axis] - shape.before[axis];
    size_[axis] = (to[axis] - from_[axis]) * shape.stride[axis] + (shape.kernel[axis] - 1) * shape.dilation[axis] + 1;
  }
}

template <class T>
void Box::fill(const T* data, int64_t channels, std::vector<float>& memory) {
  const ConvShape& s = shape_;
  memory.assign(channels * size_[0] * size_[1] * size_[2] + kSlack, 0.0f);
  memory_ = memory.data();
  step_ = {size_[0] * size_[1] * size_[2], size_[1] * size_[2], size_[2]};
  const int64_t left = std::max<int64_t>(0, -corner_[2]), right = std::min(size_[2], s.size[2] - corner_[2]);
  float* line = memory.data();
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t d = corner_[0]; d < corner_[0] + size_[0]; ++d)
      for (int64_t h = corner_[1]; h < corner_[1] + size_[1]; ++h, line += size_[2]) {
        if (d < 0 || d >= s.size[0] || h < 0 || h >= s.size[1]) continue;
        const T* x = data + ((c * s.size[0] + d) * s.size[1] + h) * s.size[2] + corner_[2];
        for (int64_t w = left; w < right; ++w) line[w] = narrow(x[w]);
      }
}

bool Box::inside() const {
  for (int axis = 0; axis < 3; ++axis)
    if (corner_[axis] < 0 || corner_[axis] + size_[axis] > shape_.size[axis]) return false;
  return true;
}

void Box::view(const float* data) {
  const ConvShape::Axes& size = shape_.size;
  step_ = {size[0] * size[1] * size[2], size[1] * size[2], size[2]};
  memory_ = data + corner_[0] * step_[1] + corner_[1] * step_[2] + corner_[2];
}

void Box::choose(int64_t first, int64_t count, Columns& columns) const {
  const ConvShape& s = shape_;
  std::vector<Run>& runs = columns.runs;
  const int64_t most = s.dilation[2] == 1 ? s.kernel[2] : 1;
  runs.clear();
  int64_t w = first % s.kernel[2], h = first / s.kernel[2] % s.kernel[1];
  int64_t d = first / (s.kernel[2] * s.kernel[1]) % s.kernel[0], c = first / (s.kernel[2] * s.kernel[1] * s.kernel[0]);
  for (int64_t at = 0; at < count;) {
    const int64_t n = most == 1 ? 1 : std::min(most - w, count - at);
    const int64_t line = c * step_[0] + d * s.dilation[0] * step_[1] + h * s.dilation[1] * step_[2];
    runs.push_back({line + w * s.dilation[2], at, n});
    at += n;
    if ((w += n) < s.kernel[2]) continue;
    w = 0;
    if (++h < s.kernel[1]) continue;
    h = 0;
    if (++d < s.kernel[0]) continue;
    d = 0;
    ++c;
  }
  columns.copied = most == 1 || most > kSlack ? 1 : most <= 4 ? 4 : most <= 8 ? 8 : 16;
  columns.whole = 0;
  while (columns.copied > 1 && columns.whole < runs.size() && runs[columns.whole].at + columns.copied <= count)
    ++columns.whole;
  columns.offsets.clear();
  if (std::all_of(runs.begin(), runs.end(), [&](const Run& run) { return run.count == columns.copied; }))
    for (const Run& run : runs) columns.offsets.push_back(run.offset);
}

template <class Copy>
void Box::each(int64_t position, int64_t rows, float* out, int64_t stride, Copy copy) const {
  const ConvShape& s = shape_;
  ConvShape::Axes at{position / (s.out[1] * s.out[2]) - from_[0], position / s.out[2] % s.out[1] - from_[1],
                     position % s.out[2]};
  for (int64_t row = 0; row < rows; ++row, out += stride) {
    copy(memory_ + at[0] * s.stride[0] * step_[1] + at[1] * s.stride[1] * step_[2] + at[2] * s.stride[2], out);
    if (++at[2] < s.out[2]) continue;
    at[2] = 0;
    if (++at[1] + from_[1] < s.out[1]) continue;
    at[1] = -from_[1];
    ++at[0];
  }
}

void Box::copy(const Columns& columns, int64_t position, int64_t rows, float* out, int64_t stride) const {
  const auto all = [&](auto most) {
    constexpr int kMost = decltype(most)::value;
    if (columns.offsets.empty())
      each(position, rows, out, stride,
           [&](const float* x, float* y) { copy_runs<kMost>(columns.runs, columns.whole, x, y); });
    else
      each(position, rows, out, stride, [&](const float* x, float* y) { copy_equal<kMost>(columns.offsets, x, y); });
  };
  if (columns.copied == 1) all(std::integral_constant<int, 1>());
  if (columns.copied == 4) all(std::integral_constant<int, 4>());
  if (columns.copied == 8) all(std::integral_constant<int, 8>());
  if (columns.copied == 16) all(std::integral_constant<int, 16>());
}

template void Box::fill(const float*, int64_t, std::vector<float>&);
template void Box::fill(const BFloat16*, int64_t, std::vector<float>&);
template void Box::fill(const Float16*, int64_t, std::vector<float>&);
template void Box::fill(const double*, int64_t, std::vector<float>&);

template <class T>
void Windows::read_as(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
                      int64_t stride) const {
  thread_local std::vector<float> memory;
  thread_local Box::Columns columns;
  const ConvShape& s = shape_;
  const int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2], channel = first / taps;
  const int64_t group = groups_.first + sample % groups_.count, all = s.inputs / s.groups;
  Box box(s, position, rows);
  box.fill(static_cast<const T*>(data_) +
               (sample / groups_.count * s.inputs + group * all + channel) * s.size[0] * s.size[1] * s.size[2],
           (first + count - 1) / taps + 1 - channel, memory);
  box.choose(first - channel * taps, count, columns);
  box.copy(columns, position, rows, out, stride);
}

void Windows::read(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
                   int64_t stride) const {
  if (rows <= 0 || count <= 0) return;
  dispatch(dtype_, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    read_as<T>(sample, position, rows, first, count, out, stride);
  });
}

void Channels::read(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
                    int64_t stride) const {
  const int64_t group = groups_.first + sample % groups_.count;
  const int64_t channel = (sample / groups_.count * all_ + group) * columns + first;
  dispatch(tensor_.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    for (int64_t i = 0; i < count; ++i) {
      const T* x = static_cast<const T*>(tensor_.at(channel + i, position));
      for (int64_t r = 0; r < rows; ++r) out[r * stride + i] = narrow(x[r]);
    }
  });
}

}  // namespace adamix
