// Per-sample squared norms of materialised gradients, rounded up.
//
// Squares are accumulated in double in blocks of fixed size, and the blocks added in order: the same bits for every
// thread count and instruction set.

#include "norm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "convert.h"
#include "isa.h"

namespace adamix {
namespace {

constexpr int64_t kBlock = 1 << 16;  // elements a thread takes at a time
constexpr int kLanes = 32;           // independent accumulators: enough to hide the latency of the addition

template <class T>
ADAMIX_INLINE double sum_sq(const T* x, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const double value = widen(x[i + j]);
      lanes[j] += value * value;
    }
  for (int j = 0; i < n; ++i, ++j) {
    const double value = widen(x[i]);
    lanes[j] += value * value;
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

template <class T>
double sum_sq_portable(const T* x, int64_t n) {
  return sum_sq(x, n);
}
template <class T>
ADAMIX_AVX2 double sum_sq_avx2(const T* x, int64_t n) {
  return sum_sq(x, n);
}
template <class T>
ADAMIX_AVX512 double sum_sq_avx512(const T* x, int64_t n) {
  return sum_sq(x, n);
}

template <class T>
void add_rows(const Tensor& tensor, int64_t rows, double* total, int threads) {
  const T* data = static_cast<const T*>(tensor.data);
  const int64_t blocks = (tensor.cols + kBlock - 1) / kBlock;
  const auto kernel = pick(sum_sq_portable<T>, sum_sq_avx2<T>, sum_sq_avx512<T>);
  std::vector<double> partial(rows * blocks);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * tensor.cols > kBlock)
  for (int64_t task = 0; task < rows * blocks; ++task) {
    const int64_t row = task / blocks, start = task % blocks * kBlock;
    partial[task] = kernel(data + row * tensor.cols + start, std::min(kBlock, tensor.cols - start));
  }
  for (int64_t task = 0; task < rows * blocks; ++task) total[task / blocks] += partial[task];
}

float round_up(double x, int64_t terms) {
  // Any order of n additions and multiplications in double errs by less than n 2^-52 of the sum, and by what
  // underflows. The smallest normal float is far above that: rows whose squares vanish must not pass for zero.
  const double upper = x * (1 + static_cast<double>(terms + 1) * std::numeric_limits<double>::epsilon());
  constexpr float infinity = std::numeric_limits<float>::infinity();
  if (!(upper <= std::numeric_limits<float>::max())) return infinity;  // NaN too
  const float y = static_cast<float>(upper);
  return std::max(y < upper ? std::nextafter(y, infinity) : y, std::numeric_limits<float>::min());
}

}  // namespace

void grad_norm_sq(const std::vector<Tensor>& tensors, int64_t rows, float* out, int threads) {
  std::vector<double> total(rows, 0.0);
  int64_t terms = 0;
  for (const Tensor& tensor : tensors) {
    terms += tensor.cols;
    dispatch(tensor.dtype,
             [&](auto* type) { add_rows<std::remove_pointer_t<decltype(type)>>(tensor, rows, total.data(), threads); });
  }
  for (int64_t row = 0; row < rows; ++row) out[row] = round_up(total[row], terms);
}

}  // namespace adamix
