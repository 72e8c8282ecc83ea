#include "panels.h"

#include <type_traits>

#include "isa.h"

namespace adamix {
namespace {

template <class T>
ADAMIX_INLINE void to_float(const void* data, int64_t n, float* out) {
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < n; ++i) out[i] = narrow(x[i]);
}
template <class T>
void to_float_portable(const void* x, int64_t n, float* out) {
  to_float<T>(x, n, out);
}
template <class T>
ADAMIX_AVX2 void to_float_avx2(const void* x, int64_t n, float* out) {
  to_float<T>(x, n, out);
}
template <class T>
ADAMIX_AVX512 void to_float_avx512(const void* x, int64_t n, float* out) {
  to_float<T>(x, n, out);
}
void copy_floats(const void* x, int64_t n, float* out) { std::memcpy(out, x, n * sizeof(float)); }

// A row of n columns times a factor, cut into panels of kTall columns that lie `panel` floats apart.
ADAMIX_INLINE void cut_row(float* row, int64_t n, double factor, float* out, int64_t panel) {
  if (factor != 1)
    for (int64_t i = 0; i < n; ++i) row[i] = static_cast<float>(row[i] * factor);
  for (; n >= kTall; n -= kTall, row += kTall, out += panel) std::memcpy(out, row, kTall * sizeof(float));
  std::memcpy(out, row, n * sizeof(float));
}
void cut_row_portable(float* row, int64_t n, double factor, float* out, int64_t panel) {
  cut_row(row, n, factor, out, panel);
}
ADAMIX_AVX2 void cut_row_avx2(float* row, int64_t n, double factor, float* out, int64_t panel) {
  cut_row(row, n, factor, out, panel);
}
ADAMIX_AVX512 void cut_row_avx512(float* row, int64_t n, double factor, float* out, int64_t panel) {
  cut_row(row, n, factor, out, panel);
}

ADAMIX_INLINE void add_wide(double* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}
void add_portable(double* x, const float* y, int64_t n) { add_wide(x, y, n); }
ADAMIX_AVX2 void add_avx2(double* x, const float* y, int64_t n) { add_wide(x, y, n); }
ADAMIX_AVX512 void add_avx512(double* x, const float* y, int64_t n) { add_wide(x, y, n); }

}  // namespace

ToFloat to_float_of(DType dtype) {
  if (dtype == DType::kFloat32) return copy_floats;
  return dispatch(dtype, [](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return pick(to_float_portable<T>, to_float_avx2<T>, to_float_avx512<T>);
  });
}

void Source::squares(int64_t sample, int64_t position, int64_t rows, double* out) const {
  constexpr int64_t kRows = 32, kColumns = 256;
  const auto sum_sq = sum_sq_of(DType::kFloat32);
  float piece[kRows * kColumns];
  std::fill_n(out, rows, 0.0);
  for (int64_t r = 0; r < rows; r += kRows)
    for (int64_t first = 0; first < columns; first += kColumns) {
      const int64_t count = std::min(kRows, rows - r), n = std::min(kColumns, columns - first);
      read(sample, position + r, count, first, n, piece, n);
      for (int64_t i = 0; i < count; ++i) out[r + i] += sum_sq(piece + i * n, n);
    }
}

void add_to(double* x, const float* y, int64_t n) { pick(add_portable, add_avx2, add_avx512)(x, y, n); }

double square_sum(const double* x, int64_t n) { return sum_sq_of(DType::kFloat64)(x, n); }

void read_flat(const Source& source, int64_t positions, int64_t first, int64_t rows, int64_t column, int64_t count,
               float* out, int64_t stride) {
  while (rows > 0) {
    const int64_t position = first % positions, n = std::min(rows, positions - position);
    source.read(first / positions, position, n, column, count, out, stride);
    first += n;
    rows -= n;
    out += n * stride;
  }
}

void Panels::pack_tall(const Source& source, int64_t positions, int64_t first, int64_t rows, int64_t column,
                       int64_t count, const double* factors) {
  rows_ = rows;
  outputs_ = count;
  tall_ = round_to(count, kTall);
  tall_panels_.resize(rows * tall_);
  row_.resize(rows * count);
  read_flat(source, positions, first, rows, column, count, row_.data(), count);
  if (count < tall_) std::fill_n(tall_panels_.data() + (tall_ - kTall) * rows, kTall * rows, 0.0f);
  const auto cut = pick(cut_row_portable, cut_row_avx2, cut_row_avx512);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = row_.data() + r * count;
    if (factors != nullptr && factors[r] == 0) std::fill_n(row, count, 0.0f);
    cut(row, count, factors != nullptr ? factors[r] : 1, tall_panels_.data() + r * kTall, rows * kTall);
  }
}

void Panels::pack_wide(const Source& source, int64_t positions, int64_t first, int64_t rows, int64_t column,
                       int64_t count, const float* factors, const double* kept) {
  inputs_ = count;
  narrow_ = outputs_ * count <= kNarrow;
  const int64_t width = narrow_ ? count : kWide;
  wide_ = round_to(count, width);
  wide_panels_.resize(rows * wide_);
  for (int64_t start = 0; start < count; start += width) {
    const int64_t n = std::min(width, count - start);
    float* panel = wide_panels_.data() + start * rows;
    if (n < width) std::fill_n(panel, width * rows, 0.0f);
    read_flat(source, positions, first, rows, column + start, n, panel, width);
    for (int64_t r = 0; r < rows && factors != nullptr; ++r, panel += width) {
      if (kept[r] == 0) std::fill_n(panel, n, 0.0f);
      for (int64_t i = 0; i < n; ++i) panel[i] *= factors[r];
    }
  }
}

void Panels::add_narrow(double* total, int64_t stride) const {
  for (int64_t k = 0; k < rows_; ++k)
    for (int64_t i = 0; i < outputs_; ++i) {
      const double g = tall_panels_[i / kTall * kTall * rows_ + k * kTall + i % kTall];
      const float* a = wide_panels_.data() + k * inputs_;
      for (int64_t j = 0; j < inputs_; ++j) total[i * stride + j] += g * a[j];
    }
}

void Panels::add(double* total, int64_t stride) const {
  if (narrow_) return add_narrow(total, stride);
  const auto product = outer();
  const auto add = pick(add_portable, add_avx2, add_avx512);
  float tile[kTall * kWide];
  for (int64_t j = 0; j < wide_; j += kWide)
    for (int64_t i = 0; i < tall_; i += kTall) {
      product({tall_panels_.data() + i * rows_, 1, kTall}, wide_panels_.data() + j * rows_, rows_, tile, kWide);
      for (int r = 0; r < kTall; ++r) add(total + (i + r) * stride + j, tile + r * kWide, kWide);
    }
}

double Panels::square() const {
  if (narrow_) {
    double product[kNarrow] = {};
    add_narrow(product, inputs_);
    return square_sum(product, outputs_ * inputs_);
  }
  const auto product = outer();
  const auto sum_sq = sum_sq_of(DType::kFloat32);
  float tile[kTall * kWide];
  double total = 0;
  for (int64_t j = 0; j < wide_; j += kWide)
    for (int64_t i = 0; i < tall_; i += kTall) {
      product({tall_panels_.data() + i * rows_, 1, kTall}, wide_panels_.data() + j * rows_, rows_, tile, kWide);
      total += sum_sq(tile, kTall * kWide);
    }
  return total;
}

void DotRows::find(const Source& source, float scale, int64_t sample, int64_t position, int64_t count, int64_t first,
                   int64_t columns, int64_t unit) {
  int64_t stride;
  const bool as_is = columns % kLanes == 0 && scale == 1;
  const float* data = as_is ? source.in_place(sample, position, first, stride) : nullptr;
  if (data == nullptr) {
    stride = round_to(columns, kLanes);
    copy_.assign(count * stride, 0.0f);
    source.read(sample, position, count, first, columns, copy_.data(), stride);
    if (scale != 1)
      for (float& x : copy_) x *= scale;
    data = copy_.data();
  }
  rows_.resize(round_to(count, unit));
  for (size_t r = 0; r < rows_.size(); ++r) rows_[r] = data + std::min<int64_t>(r, count - 1) * stride;
}

}  // namespace adamix
