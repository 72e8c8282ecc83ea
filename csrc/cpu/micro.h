#pragma once

#include <cstdint>

namespace adamix {

// The two kernels that all products of matrices in float32 are made of.

// outer: tile[i][j] = sum over k of a[k][i] b[k][j], for panels of kTall and kWide columns. Each sum is one chain of
// fused multiply-additions in the order of k (with two roundings each where the processor has none).
constexpr int kTall = 6, kWide = 64;
using Outer = void (*)(const float* a, const float* b, int64_t count, float* tile);
Outer outer();

// dot: out[i * stride + j] = sum over k of x[i][k] y[j][k], for kDotX and kDotY rows of `count` numbers, a multiple of
// kLanes. Each sum is made of dot_chains() chains, over every so many-th k, then added in pairs: count / dot_chains() +
// 4 roundings at most. What stands in the kDotSpill numbers after each row of `out` may be lost.
constexpr int kDotX = 4, kDotY = 6, kDotSpill = 2, kLanes = 16;
using Dot = void (*)(const float* const* x, const float* const* y, int64_t count, float* out, int64_t stride);
Dot dot();
int dot_chains();

}  // namespace adamix
