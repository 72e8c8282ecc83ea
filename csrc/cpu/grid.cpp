// Clipped sums in whole multiples of a grid, and their noise: exact integers, the same for any order and thread count.

#include "grid.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "blocks.h"
#include "isa.h"

namespace adamix {
namespace {

constexpr uint64_t kTooLarge = std::numeric_limits<uint64_t>::max();

// A NaN fits nowhere.
ADAMIX_INLINE bool fits(double scaled, double bound) { return std::fabs(scaled) < bound; }

// The squared norm of whole numbers below `bound` <= 2^25: at most 2^14 of them, each square below 2^50, fit in 64
// bits.
template <class T>
ADAMIX_INLINE uint64_t squares(const void* data, double factor, double bound, int64_t n) {
  static_assert(kBlock <= 1 << 14);
  const T* x = static_cast<const T*>(data);
  uint64_t sum = 0;
  int64_t outside = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double scaled = widen(x[i]) * factor;
    const bool inside = fits(scaled, bound);
    const int64_t q = static_cast<int32_t>(inside ? scaled : 0);
    sum += static_cast<uint64_t>(q * q);
    outside += !inside;
  }
  return outside ? kTooLarge : sum;
}

template <class T>
ADAMIX_INLINE void add(const void* data, double factor, int64_t* total, int64_t n) {
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < n; ++i) total[i] += static_cast<int32_t>(widen(x[i]) * factor);
}

template <class T>
uint64_t squares_portable(const void* x, double factor, double bound, int64_t n) {
  return squares<T>(x, factor, bound, n);
}
template <class T>
ADAMIX_AVX2 uint64_t squares_avx2(const void* x, double factor, double bound, int64_t n) {
  return squares<T>(x, factor, bound, n);
}
template <class T>
ADAMIX_AVX512 uint64_t squares_avx512(const void* x, double factor, double bound, int64_t n) {
  return squares<T>(x, factor, bound, n);
}

template <class T>
void add_portable(const void* x, double factor, int64_t* total, int64_t n) {
  add<T>(x, factor, total, n);
}
template <class T>
ADAMIX_AVX2 void add_avx2(const void* x, double factor, int64_t* total, int64_t n) {
  add<T>(x, factor, total, n);
}
template <class T>
ADAMIX_AVX512 void add_avx512(const void* x, double factor, int64_t* total, int64_t n) {
  add<T>(x, factor, total, n);
}

struct Kernels {
  uint64_t (*squares)(const void*, double, double, int64_t);
  void (*add)(const void*, double, int64_t*, int64_t);
};

Kernels kernels_of(DType dtype) {
  return dispatch(dtype, [](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return Kernels{pick(squares_portable<T>, squares_avx2<T>, squares_avx512<T>),
                   pick(add_portable<T>, add_avx2<T>, add_avx512<T>)};
  });
}

// Sums are of less than 2^62, the noise of less than 2^34. The nearest whole number, of two the even one, as
// torch.round.
ADAMIX_INLINE void round_all(const int64_t* sums, const double* z, double std, float grid, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<float>(sums[i] + static_cast<int64_t>(std::nearbyint(z[i] * std))) * grid;
}
void round_portable(const int64_t* sums, const double* z, double std, float grid, float* out, int64_t n) {
  round_all(sums, z, std, grid, out, n);
}
ADAMIX_AVX2 void round_avx2(const int64_t* sums, const double* z, double std, float grid, float* out, int64_t n) {
  round_all(sums, z, std, grid, out, n);
}
ADAMIX_AVX512 void round_avx512(const int64_t* sums, const double* z, double std, float grid, float* out, int64_t n) {
  round_all(sums, z, std, grid, out, n);
}

}  // namespace

void grid_clip_sum(const std::vector<GridPart>& parts, const std::vector<double>& factors, int64_t largest,
                   uint64_t most, int threads) {
  const std::vector<Block> blocks = cut(parts);
  const int64_t count = blocks.size(), rows = factors.size();
  const bool large = rows * total_cols(parts) > kSerial;
  const double bound = static_cast<double>(largest + 1);
  std::vector<Kernels> kernels;
  for (const GridPart& part : parts) kernels.push_back(kernels_of(part.dtype));
  std::vector<uint64_t> partial(rows * count);
#pragma omp parallel for num_threads(threads) schedule(static) if (large)
  for (int64_t task = 0; task < rows * count; ++task) {
    const Block& block = blocks[task % count];
    const int64_t row = task / count;
    partial[task] =
        kernels[block.part].squares(parts[block.part].at(row, block.start), factors[row], bound, block.size);
  }
  std::vector<int64_t> kept;
  for (int64_t row = 0; row < rows; ++row) {
    uint64_t total = 0;  // never above 2 most
    for (int64_t k = 0; k < count && total <= most; ++k) {
      const uint64_t own = partial[row * count + k];
      total = own > most ? own : total + own;
    }
    if (total <= most) kept.push_back(row);
  }
#pragma omp parallel for num_threads(threads) schedule(static) if (large)
  for (int64_t k = 0; k < count; ++k) {
    const GridPart& part = parts[blocks[k].part];
    int64_t* total = part.out + blocks[k].start;
    std::fill_n(total, blocks[k].size, int64_t{0});
    for (const int64_t row : kept)
      kernels[blocks[k].part].add(part.at(row, blocks[k].start), factors[row], total, blocks[k].size);
  }
}

void grid_release(const int64_t* sums, int64_t n, const Noise* noise, uint64_t offset, float grid, float* out,
                  int threads) {
  constexpr int64_t kPiece = 1024;  // whose normals stay in the first-level cache
  const auto kernel = pick(round_portable, round_avx2, round_avx512);
  const int64_t pieces = (n + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 4096)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t start = piece * kPiece, size = std::min(kPiece, n - start);
    double z[kPiece] = {};
    if (noise != nullptr) noise->normals(offset + start, size, z);
    kernel(sums + start, z, noise != nullptr ? noise->std : 0, grid, out + start, size);
  }
}

}  // namespace adamix
