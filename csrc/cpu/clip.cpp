// Weighted sums of per-sample gradients.
//
// A thread takes a block of columns and adds the rows to it in order, in double: the same bits for every thread count
// and instruction set.

#include "clip.h"

#include <algorithm>
#include <type_traits>

#include "isa.h"

namespace adamix {
namespace {

constexpr int64_t kBlock = 2048;  // columns whose accumulators, in double, stay in the first-level cache

template <class T>
ADAMIX_INLINE void add_row(const T* x, double coef, double* total, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += coef * widen(x[i]);
}

template <class T>
void add_row_portable(const T* x, double coef, double* total, int64_t n) {
  add_row(x, coef, total, n);
}
template <class T>
ADAMIX_AVX2 void add_row_avx2(const T* x, double coef, double* total, int64_t n) {
  add_row(x, coef, total, n);
}
template <class T>
ADAMIX_AVX512 void add_row_avx512(const T* x, double coef, double* total, int64_t n) {
  add_row(x, coef, total, n);
}

template <class T>
void sum_columns(const T* data, int64_t rows, int64_t cols, const double* coef, void* out, int threads) {
  using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto kernel = pick(add_row_portable<T>, add_row_avx2<T>, add_row_avx512<T>);
  const int64_t blocks = (cols + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * cols > kBlock * 16)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * kBlock, n = std::min(kBlock, cols - start);
    double total[kBlock] = {};
    for (int64_t row = 0; row < rows; ++row)
      if (coef[row] > 0) kernel(data + row * cols + start, coef[row], total, n);
    std::copy(total, total + n, static_cast<Result*>(out) + start);
  }
}

}  // namespace

void clip_sum(const void* data, DType dtype, int64_t rows, int64_t cols, const double* coef, void* out, int threads) {
  dispatch(dtype, [&](auto* type) {
    sum_columns(static_cast<decltype(type)>(const_cast<void*>(data)), rows, cols, coef, out, threads);
  });
}

}  // namespace adamix
