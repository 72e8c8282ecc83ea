#pragma once

#include <cstdint>

namespace adamix {

// The two kernels that all products of matrices in float32 are made of.

// outer: out[i * stride + j] = sum over k < count of a_i[k] b[k * kWide + j], for `rows` <= kTall rows i and kWide
// columns j. Each sum is one chain of fused multiply-additions in the order of k (with two roundings each where the
// processor has none).
constexpr int kTall = 6, kWide = 64;
// The numbers a_i[k] lie at data[i * row + k * step].
struct Tall {
  const float* data;
  int64_t row, step;

  Tall from(int64_t i) const { return {data + i * row, row, step}; }
};
using Outer = void (*)(Tall a, const float* b, int64_t count, float* out, int64_t stride);
Outer outer(int64_t rows = kTall);

// dot: out[i * stride + j] = sum over k of x[i][k] y[j][k], for kDotX and kDotY rows of `count` numbers, a multiple of
// kLanes. Each sum is made of dot_chains() chains, over every so many-th k, then added in pairs: count / dot_chains() +
// 4 roundings at most. What stands in the kDotSpill numbers after each row of `out` may be lost.
constexpr int kDotX = 4, kDotY = 6, kDotSpill = 2, kLanes = 16;
using Dot = void (*)(const float* const* x, const float* const* y, int64_t count, float* out, int64_t stride);
Dot dot();
int dot_chains();

}  // namespace adamix
