// Affine parts of normalisation layers: per sample and channel, the sums over positions of a g and of g.
//
// A sample's positions are added in an order that follows from their number and the channels', in double; so are the
// samples: the same bits for every thread count and instruction set.

#include "scale_shift.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

#include "blocks.h"
#include "float_state.h"
#include "isa.h"
#include "norm.h"

namespace adamix {
namespace {

constexpr int64_t kColumns = 512;  // of which four rows of accumulators stay in the first-level cache
constexpr int64_t kNarrow = 32;    // channels fewer than these are too few for the instructions' width
constexpr int kLanes = 16;         // independent accumulators of each kind: enough to hide the latency of the addition

// Over positions: of the terms of the gradient, and of their magnitudes.
struct Sums {
  double weight[kColumns], bias[kColumns], weight_size[kColumns], bias_size[kColumns];
};

template <class T, bool kSizes, int kRows>
ADAMIX_INLINE void add_few(const T* a, const T* g, int64_t stride, int64_t n, Sums& sums) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    double weight = sums.weight[i], bias = sums.bias[i], weight_size = 0, bias_size = 0;
    if (kSizes) weight_size = sums.weight_size[i], bias_size = sums.bias_size[i];
    for (int r = 0; r < kRows; ++r) {
      const double y = widen(g[r * stride + i]), term = widen(a[r * stride + i]) * y;
      weight += term;
      bias += y;
      if (kSizes) weight_size += std::abs(term), bias_size += std::abs(y);
    }
    sums.weight[i] = weight;
    sums.bias[i] = bias;
    if (kSizes) sums.weight_size[i] = weight_size, sums.bias_size[i] = bias_size;
  }
}

// Adds up `count` rows of `n` elements, `stride` apart.
template <class T, bool kSizes>
ADAMIX_INLINE void down(const T* a, const T* g, int64_t count, int64_t stride, int64_t n, Sums& sums) {
  for (; count >= 4; a += 4 * stride, g += 4 * stride, count -= 4) add_few<T, kSizes, 4>(a, g, stride, n, sums);
  for (; count >= 1; a += stride, g += stride, --count) add_few<T, kSizes, 1>(a, g, stride, n, sums);
}

// Adds up the `n` elements of each of `count` rows.
template <class T, bool kSizes>
ADAMIX_INLINE void across(const T* a, const T* g, int64_t count, int64_t stride, int64_t n, Sums& sums) {
  for (int64_t row = 0; row < count; ++row, a += stride, g += stride) {
    double lanes[4][kLanes] = {};
    const auto add = [&](int64_t i, int j) __attribute__((always_inline)) {
      const double y = widen(g[i]), term = widen(a[i]) * y;
      lanes[0][j] += term;
      lanes[1][j] += y;
      if (kSizes) lanes[2][j] += std::abs(term), lanes[3][j] += std::abs(y);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int j = 0; j < kLanes; ++j) add(i + j, j);
    for (int j = 0; i < n; ++i, ++j) add(i, j);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (auto& lane : lanes)
        for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
    sums.weight[row] = lanes[0][0], sums.bias[row] = lanes[1][0];
    if (kSizes) sums.weight_size[row] = lanes[2][0], sums.bias_size[row] = lanes[3][0];
  }
}

template <class T, bool kSizes, bool kAcross>
ADAMIX_INLINE void add(const void* a, const void* g, int64_t count, int64_t stride, int64_t n, Sums& sums) {
  const T *x = static_cast<const T*>(a), *y = static_cast<const T*>(g);
  if constexpr (kAcross)
    across<T, kSizes>(x, y, count, stride, n, sums);
  else
    down<T, kSizes>(x, y, count, stride, n, sums);
}

using Add = void (*)(const void*, const void*, int64_t, int64_t, int64_t, Sums&);

template <class T, bool kSizes, bool kAcross>
void add_portable(const void* a, const void* g, int64_t count, int64_t stride, int64_t n, Sums& sums) {
  add<T, kSizes, kAcross>(a, g, count, stride, n, sums);
}
template <class T, bool kSizes, bool kAcross>
ADAMIX_AVX2 void add_avx2(const void* a, const void* g, int64_t count, int64_t stride, int64_t n, Sums& sums) {
  add<T, kSizes, kAcross>(a, g, count, stride, n, sums);
}
template <class T, bool kSizes, bool kAcross>
ADAMIX_AVX512 void add_avx512(const void* a, const void* g, int64_t count, int64_t stride, int64_t n, Sums& sums) {
  add<T, kSizes, kAcross>(a, g, count, stride, n, sums);
}

template <bool kSizes, bool kAcross>
Add add_of(DType dtype) {
  return dispatch(dtype, [](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return pick(add_portable<T, kSizes, kAcross>, add_avx2<T, kSizes, kAcross>, add_avx512<T, kSizes, kAcross>);
  });
}

// The sums of one sample for `size` channels from `start` on.
template <bool kSizes>
void sum_sample(const Scaled& layer, int64_t sample, int64_t start, int64_t size, Sums& sums) {
  const int64_t cols = layer.cols, positions = layer.positions;
  const auto run = [&](Add kernel, int64_t first, int64_t count, int64_t stride, int64_t n) {
    const int64_t byte = (sample * positions * cols + first) * size_of(layer.dtype);
    kernel(static_cast<const char*>(layer.activations) + byte, static_cast<const char*>(layer.backprops) + byte, count,
           stride, n, sums);
  };
  if (layer.channels_first)
    return run(add_of<kSizes, true>(layer.dtype), start * positions, size, positions, positions);

  // Where channels are few, all of them, several positions taken as one row, whose sums are then added up.
  const int64_t fold = cols < kNarrow ? std::clamp<int64_t>(2 * kNarrow / cols, 1, std::max<int64_t>(positions, 1)) : 1;
  const int64_t rows = positions / fold, width = fold * cols, folded = fold * size;
  const auto each = [&](auto body) {
    for (double* sum : {sums.weight, sums.bias}) body(sum);
    if (kSizes)
      for (double* sum : {sums.weight_size, sums.bias_size}) body(sum);
  };
  each([&](double* sum) { std::fill_n(sum, folded, 0.0); });
  run(add_of<kSizes, false>(layer.dtype), start, rows, width, folded);
  if (positions % fold) run(add_of<kSizes, false>(layer.dtype), rows * width, 1, 0, positions % fold * cols);
  each([&](double* sum) {
    for (int64_t row = size; row < folded; row += size)
      for (int64_t i = 0; i < size; ++i) sum[i] += sum[row + i];
  });
}

int64_t blocks_of(const Scaled& layer) { return (layer.cols + kColumns - 1) / kColumns; }

}  // namespace

void scale_shift_norm_sq(const Scaled& layer, bool bias, float* out, int threads) {
  const int64_t samples = layer.samples, blocks = blocks_of(layer);
  // Each channel's gradient is off by (T + 2) 2^-52 times the sum of its terms' magnitudes at most (`own_error` in
  // adamix_kernels/ops/_factored.py): that of the norm here, and that of the clipped sum.
  const double error = 2 * static_cast<double>(layer.positions + 2) * std::numeric_limits<double>::epsilon();
  const SumSq square = sum_sq_of(DType::kFloat64);
  std::vector<double> partial(samples * blocks), squares(samples);
  const FloatState state = FloatState::current();
#pragma omp parallel for num_threads(threads) schedule(static) if (samples * layer.positions * layer.cols > kSerial)
  for (int64_t task = 0; task < samples * blocks; ++task) {
    const FloatState::Hold hold(state);
    const int64_t start = task % blocks * kColumns, size = std::min(kColumns, layer.cols - start);
    Sums sums;
    sum_sample<true>(layer, task / blocks, start, size, sums);
    for (int64_t i = 0; i < size; ++i) {
      sums.weight[i] = std::abs(sums.weight[i]) + error * sums.weight_size[i];
      sums.bias[i] = std::abs(sums.bias[i]) + error * sums.bias_size[i];
    }
    partial[task] = square(sums.weight, size) + (bias ? square(sums.bias, size) : 0);
  }
  for (int64_t b = 0; b < samples; ++b)
    squares[b] = std::accumulate(partial.data() + b * blocks, partial.data() + (b + 1) * blocks, 0.0);
  round_up(squares, 2 * layer.cols + 16, out);
}

void scale_shift_clip_sum(const Scaled& layer, const std::vector<double>& coef, void* weight, void* bias, int threads) {
  const int64_t samples = layer.samples, cols = layer.cols, blocks = blocks_of(layer);
  // Samples that are added up by one thread, however many there are.
  const int64_t together = std::max<int64_t>(4, (samples + 63) / 64), chunks = (samples + together - 1) / together;
  std::vector<double> partial(2 * chunks * cols);
  const FloatState state = FloatState::current();
#pragma omp parallel for num_threads(threads) schedule(static) if (samples * layer.positions * cols > kSerial)
  for (int64_t task = 0; task < chunks * blocks; ++task) {
    const FloatState::Hold hold(state);
    const int64_t chunk = task / blocks, start = task % blocks * kColumns, size = std::min(kColumns, cols - start);
    double *weights = partial.data() + 2 * chunk * cols + start, *biases = weights + cols;
    for (int64_t b = chunk * together; b < std::min(samples, (chunk + 1) * together); ++b) {
      if (!(coef[b] > 0)) continue;
      Sums sums;
      sum_sample<false>(layer, b, start, size, sums);
      for (int64_t i = 0; i < size; ++i) {
        weights[i] += coef[b] * sums.weight[i];
        biases[i] += coef[b] * sums.bias[i];
      }
    }
  }
  for (int64_t i = 0; i < 2 * cols; ++i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[2 * chunk * cols + i];
    void* out = i < cols ? weight : bias;
    if (out == nullptr) break;
    if (layer.dtype == DType::kFloat64)
      static_cast<double*>(out)[i % cols] = sum;
    else
      static_cast<float*>(out)[i % cols] = static_cast<float>(sum);
  }
}

}  // namespace adamix
