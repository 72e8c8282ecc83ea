// Per-sample squared norms of materialised gradients, rounded up.
//
// Squares are accumulated in double in blocks of fixed size, and the blocks added in order: the same bits for every
// thread count and instruction set.

#include "norm.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>

#include "blocks.h"
#include "isa.h"

namespace adamix {
namespace {

constexpr int kLanes = 32;  // independent accumulators: enough to hide the latency of the addition

// sum + x^2. The square of a narrower number is exact in double, so one operation gives the bits of two.
template <bool kFused>
ADAMIX_INLINE double add_square(double x, double sum) {
  return kFused ? __builtin_fma(x, x, sum) : sum + x * x;
}

template <class T, bool kFused>
ADAMIX_INLINE double sum_sq(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  if (n < kLanes) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += widen(x[i]) * widen(x[i]);
    return sum;
  }
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] = add_square<kFused>(widen(x[i + j]), lanes[j]);
  for (int j = 0; i < n; ++i, ++j) {
    const double value = widen(x[i]);
    lanes[j] += value * value;
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

template <class T>
double sum_sq_portable(const void* x, int64_t n) {
  return sum_sq<T, false>(x, n);
}
template <class T>
ADAMIX_AVX2 double sum_sq_avx2(const void* x, int64_t n) {
  return sum_sq<T, sizeof(T) < sizeof(double)>(x, n);
}
template <class T>
ADAMIX_AVX512 double sum_sq_avx512(const void* x, int64_t n) {
  return sum_sq<T, sizeof(T) < sizeof(double)>(x, n);
}

}  // namespace

SumSq sum_sq_of(DType dtype) {
  return dispatch(dtype, [](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return pick(sum_sq_portable<T>, sum_sq_avx2<T>, sum_sq_avx512<T>);
  });
}

float round_up(double sum, int64_t terms) {
  // Any order of n additions and multiplications in double errs by less than n 2^-52 of the sum, and by what
  // underflows. The smallest normal float is far above that: rows whose squares vanish must not pass for zero.
  const double upper = sum * (1 + static_cast<double>(terms + 1) * std::numeric_limits<double>::epsilon());
  constexpr float least = std::numeric_limits<float>::min(), infinity = std::numeric_limits<float>::infinity();
  const float nearest = static_cast<float>(upper);
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof bits);
  const float y = as_float(bits + (nearest < upper));
  const float bounded = y > least ? y : least;
  return upper <= std::numeric_limits<float>::max() ? bounded : infinity;  // NaN too
}

void round_up(const std::vector<double>& sums, int64_t terms, float* out) {
  for (size_t i = 0; i < sums.size(); ++i) out[i] = round_up(sums[i], terms);
}

void grad_norm_sq(const std::vector<Tensor>& tensors, int64_t rows, float* out, int threads) {
  const std::vector<Block> blocks = cut(tensors);
  const int64_t count = blocks.size(), terms = total_cols(tensors);
  std::vector<SumSq> kernels;
  for (const Tensor& tensor : tensors) kernels.push_back(sum_sq_of(tensor.dtype));
  std::vector<double> partial(rows * count);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * terms > kSerial)
  for (int64_t task = 0; task < rows * count; ++task) {
    const Block& block = blocks[task % count];
    const Tensor& tensor = tensors[block.part];
    partial[task] = kernels[block.part](tensor.at(task / count, block.start), block.size);
  }
  std::vector<double> sums(rows);
  for (int64_t row = 0; row < rows; ++row)
    sums[row] = std::accumulate(partial.data() + row * count, partial.data() + (row + 1) * count, 0.0);
  round_up(sums, terms, out);
}

}  // namespace adamix
