#include "conv.h"

#include <type_traits>

namespace adamix {

Windows::Windows(const void* data, DType dtype, const ConvShape& shape, Groups groups)
    : Source(shape.window()), data_(data), dtype_(dtype), shape_(shape), groups_(groups) {
  const auto& [depth, height, width] = shape.size;
  for (int64_t channel = 0; channel < shape.inputs / shape.groups; ++channel)
    for (int64_t d = 0; d < shape.kernel[0]; ++d)
      for (int64_t h = 0; h < shape.kernel[1]; ++h)
        for (int64_t w = 0; w < shape.kernel[2]; ++w) {
          const ConvShape::Axes shift{d * shape.dilation[0], h * shape.dilation[1], w * shape.dilation[2]};
          columns_.push_back({((channel * depth + shift[0]) * height + shift[1]) * width + shift[2], shift});
          offsets_.push_back(columns_.back().offset);
        }
}

template <class T>
void Windows::read_as(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
                      int64_t stride) const {
  const auto& [depth, height, width] = shape_.size;
  const int64_t channels = shape_.inputs / shape_.groups, group = groups_.first + sample % groups_.count;
  const T* data = static_cast<const T*>(data_) +
                  (sample / groups_.count * shape_.inputs + group * channels) * depth * height * width;
  ConvShape::Axes at{position / (shape_.out[1] * shape_.out[2]), position / shape_.out[2] % shape_.out[1],
                     position % shape_.out[2]};
  for (int64_t row = 0; row < rows; ++row, out += stride) {
    ConvShape::Axes corner;
    bool inside = true;
    for (int axis = 0; axis < 3; ++axis) {
      corner[axis] = at[axis] * shape_.stride[axis] - shape_.before[axis];
      const int64_t last = corner[axis] + (shape_.kernel[axis] - 1) * shape_.dilation[axis];
      inside &= corner[axis] >= 0 && last < shape_.size[axis];
    }
    for (int axis = 2; axis >= 0; --axis) {
      if (++at[axis] < shape_.out[axis]) break;
      at[axis] = 0;
    }
    const int64_t base = (corner[0] * height + corner[1]) * width + corner[2];
    if (inside) {
      const T* window = data + base;
      const int64_t* offsets = offsets_.data() + first;
      for (int64_t i = 0; i < count; ++i) out[i] = narrow(window[offsets[i]]);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      const Column& column = columns_[first + i];
      bool there = true;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t x = corner[axis] + column.shift[axis];
        there &= x >= 0 && x < shape_.size[axis];
      }
      out[i] = there ? narrow(data[base + column.offset]) : 0;
    }
  }
}

void Windows::read(int64_t sample, int64_t position, int64_t rows, int64_t first, int64_t count, float* out,
                   int64_t stride) const {
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
