// Weighted sums of per-sample gradients, alone or fused with their norms and the noise.
//
// A thread owns blocks of columns and adds the rows to them in order, in double: the same bits for every thread count,
// cache and instruction set.

#include "clip.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>

#include "barrier.h"
#include "blocks.h"
#include "isa.h"

namespace adamix {
namespace {

constexpr int kRows = 8;  // rows added in one pass over the accumulators

template <class T, int kCount>
ADAMIX_INLINE void add_few(const void* const* rows, const double* coef, double* total, int64_t n) {
  const T* x[kCount];
  for (int r = 0; r < kCount; ++r) x[r] = static_cast<const T*>(rows[r]);
  for (int64_t i = 0; i < n; ++i) {
    double sum = total[i];
    for (int r = 0; r < kCount; ++r) sum += coef[r] * widen(x[r][i]);
    total[i] = sum;
  }
}

template <class T>
ADAMIX_INLINE void add(const void* const* rows, const double* coef, int64_t count, double* total, int64_t n) {
  for (; count >= kRows; rows += kRows, coef += kRows, count -= kRows) add_few<T, kRows>(rows, coef, total, n);
  if (count >= 4) add_few<T, 4>(rows, coef, total, n), rows += 4, coef += 4, count -= 4;
  if (count >= 2) add_few<T, 2>(rows, coef, total, n), rows += 2, coef += 2, count -= 2;
  if (count >= 1) add_few<T, 1>(rows, coef, total, n);
}

// Rows too short to be worth gathering, `stride` elements apart.
template <class T>
ADAMIX_INLINE void add_narrow(const void* first, int64_t stride, const double* coef, int64_t count, double* total,
                              int64_t n) {
  const T* x = static_cast<const T*>(first);
  for (int64_t row = 0; row < count; ++row, x += stride)
    if (coef[row] > 0)
      for (int64_t i = 0; i < n; ++i) total[i] += coef[row] * widen(x[i]);
}

template <class T>
void add_portable(const void* const* rows, const double* coef, int64_t count, double* total, int64_t n) {
  add<T>(rows, coef, count, total, n);
}
template <class T>
ADAMIX_AVX2 void add_avx2(const void* const* rows, const double* coef, int64_t count, double* total, int64_t n) {
  add<T>(rows, coef, count, total, n);
}
template <class T>
ADAMIX_AVX512 void add_avx512(const void* const* rows, const double* coef, int64_t count, double* total, int64_t n) {
  add<T>(rows, coef, count, total, n);
}

template <class T>
void narrow_portable(const void* first, int64_t stride, const double* coef, int64_t count, double* total, int64_t n) {
  add_narrow<T>(first, stride, coef, count, total, n);
}
template <class T>
ADAMIX_AVX2 void narrow_avx2(const void* first, int64_t stride, const double* coef, int64_t count, double* total,
                             int64_t n) {
  add_narrow<T>(first, stride, coef, count, total, n);
}
template <class T>
ADAMIX_AVX512 void narrow_avx512(const void* first, int64_t stride, const double* coef, int64_t count, double* total,
                                 int64_t n) {
  add_narrow<T>(first, stride, coef, count, total, n);
}

using Narrow = void (*)(const void*, int64_t, const double*, int64_t, double*, int64_t);

Narrow narrow_of(DType dtype) {
  return dispatch(dtype, [](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return pick(narrow_portable<T>, narrow_avx2<T>, narrow_avx512<T>);
  });
}

// Rows `from` .. `from` + n, those with a positive factor, added to the accumulators of `size` columns.
void add_rows(const Part& part, int64_t start, int64_t size, const std::vector<double>& coef, int64_t from, int64_t n,
              double* total) {
  if (size < 32) return narrow_of(part.dtype)(part.at(from, start), part.cols, coef.data(), n, total, size);
  const Add kernel = add_of(part.dtype);
  const void* rows[4 * kRows];
  double factors[4 * kRows];
  int count = 0;
  for (int64_t row = 0; row < n; ++row) {
    if (coef[row] > 0) {
      rows[count] = part.at(from + row, start);
      factors[count++] = coef[row];
    }
    if (count == 4 * kRows || (row + 1 == n && count)) {
      kernel(rows, factors, count, total, size);
      count = 0;
    }
  }
}

// An infinite norm makes the quotient 0, or NaN, and no NaN passes the last comparison.
ADAMIX_INLINE void make_coef(const double* norm_sq, int64_t rows, double threshold, float* coef) {
  for (int64_t i = 0; i < rows; ++i) {
    const double quotient = threshold / std::sqrt(norm_sq[i]), exact = quotient > 1 ? 1 : quotient;
    const float nearest = static_cast<float>(exact);
    uint32_t bits;
    std::memcpy(&bits, &nearest, sizeof bits);
    bits -= nearest > exact;
    coef[i] = exact >= std::numeric_limits<float>::min() ? as_float(bits) : 0;
  }
}
void coef_portable(const double* norm_sq, int64_t rows, double threshold, float* coef) {
  make_coef(norm_sq, rows, threshold, coef);
}
ADAMIX_AVX2 void coef_avx2(const double* norm_sq, int64_t rows, double threshold, float* coef) {
  make_coef(norm_sq, rows, threshold, coef);
}
ADAMIX_AVX512 void coef_avx512(const double* norm_sq, int64_t rows, double threshold, float* coef) {
  make_coef(norm_sq, rows, threshold, coef);
}

template <class T>
ADAMIX_INLINE void round_sums(const double* total, double std, const double* z, void* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) static_cast<T*>(out)[i] = static_cast<T>(total[i] + std * z[i]);
}
template <class T>
void round_sums_portable(const double* total, double std, const double* z, void* out, int64_t n) {
  round_sums<T>(total, std, z, out, n);
}
template <class T>
ADAMIX_AVX2 void round_sums_avx2(const double* total, double std, const double* z, void* out, int64_t n) {
  round_sums<T>(total, std, z, out, n);
}
template <class T>
ADAMIX_AVX512 void round_sums_avx512(const double* total, double std, const double* z, void* out, int64_t n) {
  round_sums<T>(total, std, z, out, n);
}

// Where the sums of a block are kept, in double, from one group of rows to the next: float results have room for half
// of them, so that only the other half needs memory of its own.
struct Carried {
  double *first, *second;
  int64_t half;
};

std::vector<Carried> carry(const std::vector<Part>& parts, const std::vector<Block>& blocks,
                           std::unique_ptr<double[]>& scratch) {
  std::vector<Carried> carried;
  int64_t used = 0;
  for (const Block& block : blocks) {
    const Part& part = parts[block.part];
    const bool wide = part.dtype == DType::kFloat64;
    const int64_t half = wide ? block.size : block.size / 2;
    char* out = static_cast<char*>(part.out) + block.start * (wide ? 8 : 4);
    carried.push_back({reinterpret_cast<double*>(out), nullptr, half});
    used += block.size - half;
  }
  scratch.reset(new double[used]);  // each thread clears what it will use
  double* next = scratch.get();
  for (size_t k = 0; k < blocks.size(); ++k) {
    carried[k].second = next;
    next += blocks[k].size - carried[k].half;
  }
  return carried;
}

// How many rows to take at a time. All, if all stay in cache. Else few enough that they are still in cache when, their
// norms known, they are added; but four at least, since each time the accumulators are read and written too, and in
// few turns, since in each the threads wait for one another, and for whoever else wants their cores. If so many do not
// stay in cache, all: the second reading is then from memory, but a block's accumulators stay in a cache.
int64_t rows_together(const std::vector<Part>& parts, int64_t rows, int64_t cache) {
  constexpr int64_t kLeast = 4, kTurns = 32;
  int64_t bytes = 1;
  for (const Part& part : parts) bytes += part.cols * size_of(part.dtype);
  const int64_t together = std::max({cache / 8 / bytes, kLeast, (rows + kTurns - 1) / kTurns});
  return rows * bytes <= cache || 2 * together * bytes > cache ? rows : together;
}

// A block's sums over all rows, whose factors these are.
void sum_block(const Part& part, const Block& block, const std::vector<double>& coef, const Noise* noise) {
  double total[kBlock];
  std::fill_n(total, block.size, 0.0);
  add_rows(part, block.start, block.size, coef, 0, coef.size(), total);
  finish(part, block.start, block.size, total, noise);
}

}  // namespace

void finish(const Part& part, int64_t start, int64_t size, const double* total, const Noise* noise) {
  constexpr int64_t kPiece = 1024;
  const bool wide = part.dtype == DType::kFloat64;
  const auto kernel = wide ? pick(round_sums_portable<double>, round_sums_avx2<double>, round_sums_avx512<double>)
                           : pick(round_sums_portable<float>, round_sums_avx2<float>, round_sums_avx512<float>);
  char* out = static_cast<char*>(part.out) + start * (wide ? 8 : 4);
  double z[kPiece], piece[kPiece];  // a copy is read, as what is written may lie where it was
  std::fill_n(z, std::min(kPiece, size), 0.0);
  for (int64_t i = 0; i < size; i += kPiece) {
    const int64_t n = std::min(kPiece, size - i);
    if (noise != nullptr) noise->normals(part.offset + start + i, n, z);
    std::copy_n(total + i, n, piece);
    kernel(piece, noise != nullptr ? noise->std : 0, z, out + i * (wide ? 8 : 4), n);
  }
}

Add add_of(DType dtype) {
  return dispatch(dtype, [](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return pick(add_portable<T>, add_avx2<T>, add_avx512<T>);
  });
}

void clip_coef(const double* norm_sq, int64_t rows, double threshold, float* coef) {
  pick(coef_portable, coef_avx2, coef_avx512)(norm_sq, rows, threshold, coef);
}

void clip_sum(const std::vector<Part>& parts, const std::vector<double>& coef, int threads) {
  const std::vector<Block> blocks = cut(parts);
  const int64_t count = blocks.size(), rows = coef.size();
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * total_cols(parts) > kSerial)
  for (int64_t k = 0; k < count; ++k) sum_block(parts[blocks[k].part], blocks[k], coef, nullptr);
}

void clip_sum_noise(const std::vector<Part>& parts, int64_t rows, double threshold, float* norm_sq, const Noise* noise,
                    int threads, int64_t cache) {
  const std::vector<Block> blocks = cut(parts);
  const int64_t count = blocks.size(), terms = total_cols(parts), together = rows_together(parts, rows, cache);
  const bool several = together < rows;
  std::vector<SumSq> squares;
  for (const Part& part : parts) squares.push_back(sum_sq_of(part.dtype));
  // Twice, in turn: a thread may be ahead of the others by one group.
  std::vector<double> partial((several ? 2 : 1) * together * count);
  std::unique_ptr<double[]> scratch;
  const std::vector<Carried> carried = several ? carry(parts, blocks, scratch) : std::vector<Carried>();
  Barrier barrier;
#pragma omp parallel num_threads(threads) if (std::max<int64_t>(rows, 1) * terms > kSerial)
  {
    const Thread thread;
    int64_t first, last;
    share(blocks, thread, first, last);
    for (int64_t k = first; several && k < last; ++k) {
      std::fill_n(carried[k].first, carried[k].half, 0.0);
      std::fill_n(carried[k].second, blocks[k].size - carried[k].half, 0.0);
    }
    std::vector<double> norms(together), coef(together);
    std::vector<float> factors(together);
    double* sums = partial.data();
    for (int64_t start = 0; start < rows; start += together) {
      const int64_t n = std::min(together, rows - start);
      for (int64_t row = 0; row < n; ++row)
        for (int64_t k = first; k < last; ++k) {
          const Part& part = parts[blocks[k].part];
          sums[row * count + k] = squares[blocks[k].part](part.at(start + row, blocks[k].start), blocks[k].size);
        }
      barrier.wait(thread.count);
      for (int64_t row = 0; row < n; ++row)
        norms[row] = std::accumulate(sums + row * count, sums + (row + 1) * count, 0.0);
      round_up(norms, terms, factors.data());
      if (thread.index == 0) std::copy_n(factors.begin(), n, norm_sq + start);
      std::copy_n(factors.begin(), n, norms.begin());
      clip_coef(norms.data(), n, threshold, factors.data());
      std::copy_n(factors.begin(), n, coef.begin());
      if (!several) break;
      for (int64_t k = last - 1; k >= first; --k) {  // backwards: the rows' last blocks were read last
        const auto [front, back, half] = carried[k];
        const Part& part = parts[blocks[k].part];
        add_rows(part, blocks[k].start, half, coef, start, n, front);
        add_rows(part, blocks[k].start + half, blocks[k].size - half, coef, start, n, back);
      }
      sums = sums == partial.data() ? sums + together * count : partial.data();
    }
    for (int64_t k = last - 1; k >= first; --k) {
      const Part& part = parts[blocks[k].part];
      if (!several) {
        sum_block(part, blocks[k], coef, noise);
        continue;
      }
      const auto [front, back, half] = carried[k];
      finish(part, blocks[k].start, half, front, noise);
      finish(part, blocks[k].start + half, blocks[k].size - half, back, noise);
    }
  }
}

}  // namespace adamix
