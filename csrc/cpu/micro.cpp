// Products of matrices in float32, tile by tile, in registers.

#include "micro.h"

#include <cstring>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "isa.h"

// The only file where a product and an addition may become one operation: its rounding is bounded either way.
#ifdef __clang__
#pragma clang fp contract(fast)
#define ADAMIX_FUSED
#else
#define ADAMIX_FUSED __attribute__((optimize("fp-contract=fast", "align-loops=64")))
#endif

namespace adamix {
namespace {

template <int kSize>
struct Vectors {
  typedef float Type __attribute__((vector_size(4 * kSize)));  // in a `using` GCC ignores a size that depends
  typedef float Unaligned __attribute__((vector_size(4 * kSize), aligned(4)));
};
template <int kSize>
using Vector = typename Vectors<kSize>::Type;

template <int kSize>
ADAMIX_INLINE void load(const float* x, Vector<kSize>& out) {
  out = *reinterpret_cast<const typename Vectors<kSize>::Unaligned*>(x);
}

template <int kSize>
ADAMIX_INLINE void store(const Vector<kSize>& x, float* out) {
  *reinterpret_cast<typename Vectors<kSize>::Unaligned*>(out) = x;
}

// kRows x kVectors accumulators of kSize numbers: as many as the processor has registers for.
template <int kSize, int kRows, int kVectors>
ADAMIX_INLINE void outer_part(Tall a, const float* b, int64_t count, float* out, int64_t stride) {
  Vector<kSize> sum[kRows][kVectors] = {};
  const float* row[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) row[i] = a.data + i * a.row;
  for (int64_t k = 0; k < count; ++k, b += kWide) {
    Vector<kSize> wide[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) load<kSize>(b + v * kSize, wide[v]);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] += row[i][k * a.step] * wide[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store<kSize>(sum[i][v], out + i * stride + v * kSize);
}

template <int kSize, int kRows, int kVectors, int kAll>
ADAMIX_INLINE void outer_all(Tall a, const float* b, int64_t count, float* out, int64_t stride) {
  constexpr int kLeft = kAll % kRows;
  for (int j = 0; j < kWide; j += kVectors * kSize) {
    for (int i = 0; i < kAll - kLeft; i += kRows)
      outer_part<kSize, kRows, kVectors>(a.from(i), b + j, count, out + i * stride + j, stride);
    if constexpr (kLeft > 0)
      outer_part<kSize, kLeft, kVectors>(a.from(kAll - kLeft), b + j, count, out + (kAll - kLeft) * stride + j, stride);
  }
}

// With strides that the compiler knows, packed panels are a little faster.
template <int kSize, int kRows, int kVectors, int kAll>
ADAMIX_INLINE void outer_packed_or_not(Tall a, const float* b, int64_t count, float* out, int64_t stride) {
  if (a.row == 1 && a.step == kTall)
    outer_all<kSize, kRows, kVectors, kAll>({a.data, 1, kTall}, b, count, out, stride);
  else
    outer_all<kSize, kRows, kVectors, kAll>(a, b, count, out, stride);
}

template <int kAll>
void outer_portable(Tall a, const float* b, int64_t count, float* out, int64_t stride) {
  outer_packed_or_not<4, 3, 4, kAll>(a, b, count, out, stride);
}
template <int kAll>
ADAMIX_AVX2 ADAMIX_FUSED void outer_avx2(Tall a, const float* b, int64_t count, float* out, int64_t stride) {
  outer_packed_or_not<8, 6, 2, kAll>(a, b, count, out, stride);
}
template <int kAll>
ADAMIX_AVX512 ADAMIX_FUSED void outer_avx512(Tall a, const float* b, int64_t count, float* out, int64_t stride) {
  outer_packed_or_not<16, 6, 4, kAll>(a, b, count, out, stride);
}

template <int... kLess>
Outer outer_of(int64_t rows, std::integer_sequence<int, kLess...>) {
  static const Outer portable[] = {outer_portable<kLess + 1>...}, avx2[] = {outer_avx2<kLess + 1>...},
                     avx512[] = {outer_avx512<kLess + 1>...};
  return pick(portable, avx2, avx512)[rows - 1];
}

// kX x kY sums, each of kSize chains.
template <int kSize, int kX, int kY>
ADAMIX_INLINE void dot_part(const float* const* x, const float* const* y, int64_t count, Vector<kSize> (&sum)[kX][kY]) {
  for (int64_t k = 0; k < count; k += kSize) {
    Vector<kSize> row[kX];
#pragma GCC unroll 8
    for (int i = 0; i < kX; ++i) load<kSize>(x[i] + k, row[i]);
#pragma GCC unroll 8
    for (int j = 0; j < kY; ++j) {
      Vector<kSize> other;
      load<kSize>(y[j] + k, other);
#pragma GCC unroll 8
      for (int i = 0; i < kX; ++i) sum[i][j] += row[i] * other;
    }
  }
}

template <int kSize>
ADAMIX_INLINE void dot_all(const float* const* x, const float* const* y, int64_t count, float* out, int64_t stride) {
  for (int i = 0; i < kDotX; i += 2) {
    Vector<kSize> sum[2][kDotY] = {};
    dot_part<kSize, 2, kDotY>(x + i, y, count, sum);
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kDotY; ++c) {
        float lanes[kSize];
        store<kSize>(sum[r][c], lanes);
        for (int width = kSize / 2; width > 0; width /= 2)
          for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
        out[(i + r) * stride + c] = lanes[0];
      }
  }
}

void dot_portable(const float* const* x, const float* const* y, int64_t count, float* out, int64_t stride) {
  dot_all<4>(x, y, count, out, stride);
}
ADAMIX_AVX2 ADAMIX_FUSED void dot_avx2(const float* const* x, const float* const* y, int64_t count, float* out,
                                       int64_t stride) {
  dot_all<8>(x, y, count, out, stride);
}

#ifdef ADAMIX_X86
// The halves of x's groups of 2 kHalf lanes added to one another, then those of y's.
template <int kHalf>
ADAMIX_AVX512 inline __m512 fold(__m512 x, __m512 y) {
  alignas(64) int low[16], high[16];
#pragma GCC unroll 16
  for (int lane = 0; lane < 16; ++lane) {
    low[lane] = lane / kHalf * 2 * kHalf + lane % kHalf;
    high[lane] = low[lane] + kHalf;
  }
  return _mm512_permutex2var_ps(x, _mm512_load_si512(low), y) + _mm512_permutex2var_ps(x, _mm512_load_si512(high), y);
}

ADAMIX_AVX512 ADAMIX_FUSED void dot_avx512(const float* const* x, const float* const* y, int64_t count, float* out,
                                           int64_t stride) {
  Vector<16> sum[4][6] = {};
  dot_part<16, 4, 6>(x, y, count, sum);
  // Each step halves the lanes and puts two vectors into one, in the end two rows of 6 sums and 2 zeros into each.
  __m512 rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 s0 = fold<8>(sum[i][0], sum[i][1]), s1 = fold<8>(sum[i][2], sum[i][3]),
                 s2 = fold<8>(sum[i][4], sum[i][5]);
    rows[i] = fold<2>(fold<4>(s0, s1), fold<4>(s2, _mm512_setzero_ps()));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    const __m512 two = fold<1>(rows[i], rows[i + 1]);
    _mm512_mask_storeu_ps(out + i * stride, 0x00FF, two);
    _mm512_mask_storeu_ps(out + (i + 1) * stride - 8, 0xFF00, two);
  }
}
#else
constexpr auto dot_avx512 = dot_portable;
#endif

}  // namespace

Outer outer(int64_t rows) { return outer_of(rows, std::make_integer_sequence<int, kTall>()); }
Dot dot() { return pick(dot_portable, dot_avx2, dot_avx512); }
int dot_chains() { return pick(4, 8, 16); }

}  // namespace adamix
