// Weighted sums of per-sample gradients.
//
// A thread takes a block of columns and adds the rows to it in order, in double: the same bits for every thread count
// and instruction set.

#include "clip.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "isa.h"

namespace adamix {
namespace {

constexpr int64_t kBlock = 2048;  // columns whose accumulators, in double, stay in the first-level cache
constexpr int kRows = 4;          // rows added in one pass over the accumulators

template <class T>
struct Rows {
  const T* at[kRows];
  double coef[kRows];
  int count = 0;
};

template <class T>
ADAMIX_INLINE void add_rows(const Rows<T>& rows, int64_t start, double* total, int64_t n) {
  if (rows.count == kRows) {
    const T *x0 = rows.at[0] + start, *x1 = rows.at[1] + start, *x2 = rows.at[2] + start, *x3 = rows.at[3] + start;
    const double c0 = rows.coef[0], c1 = rows.coef[1], c2 = rows.coef[2], c3 = rows.coef[3];
    for (int64_t i = 0; i < n; ++i)
      total[i] = total[i] + c0 * widen(x0[i]) + c1 * widen(x1[i]) + c2 * widen(x2[i]) + c3 * widen(x3[i]);
    return;
  }
  for (int row = 0; row < rows.count; ++row)
    for (int64_t i = 0; i < n; ++i) total[i] += rows.coef[row] * widen(rows.at[row][start + i]);
}

template <class T>
void add_rows_portable(const Rows<T>& rows, int64_t start, double* total, int64_t n) {
  add_rows(rows, start, total, n);
}
template <class T>
ADAMIX_AVX2 void add_rows_avx2(const Rows<T>& rows, int64_t start, double* total, int64_t n) {
  add_rows(rows, start, total, n);
}
template <class T>
ADAMIX_AVX512 void add_rows_avx512(const Rows<T>& rows, int64_t start, double* total, int64_t n) {
  add_rows(rows, start, total, n);
}

template <class T>
void sum_columns(const T* data, int64_t rows, int64_t cols, const double* coef, void* out, int threads) {
  using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto kernel = pick(add_rows_portable<T>, add_rows_avx2<T>, add_rows_avx512<T>);
  std::vector<Rows<T>> groups;
  for (int64_t row = 0; row < rows; ++row) {
    if (!(coef[row] > 0)) continue;
    if (groups.empty() || groups.back().count == kRows) groups.emplace_back();
    Rows<T>& group = groups.back();
    group.at[group.count] = data + row * cols;
    group.coef[group.count++] = coef[row];
  }
  const int64_t blocks = (cols + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * cols > kBlock * 16)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * kBlock, n = std::min(kBlock, cols - start);
    double total[kBlock] = {};
    for (const Rows<T>& group : groups) kernel(group, start, total, n);
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
