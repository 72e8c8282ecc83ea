// What the kernels of a clipped sum share: how a warp adds to its columns, and finishes them.
#pragma once

#include "noise.cuh"

namespace adamix {

// Adds `factor` times 16 bytes of elements to float64 sums; `widen` makes a double of a float.
template <class T, class Widen>
__device__ void add_scaled(uint4 v, double factor, Widen widen, double* sum) {
  if constexpr (std::is_same_v<T, double>) {
    double x[2];
    unpack(v, x);
    sum[0] = fma(factor, x[0], sum[0]);
    sum[1] = fma(factor, x[1], sum[1]);
  } else {
    float x[kVec<T>];
    unpack<T>(v, x);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) sum[i] = fma(factor, widen(x[i]), sum[i]);
  }
}

// Adds noise, if any, to a chunk's float64 sums and writes them, rounded once. `z` [Chunk::kColumns]: this warp's.
template <class T>
__device__ void finish_sum(const Chunk<T>& chunk, double (&sum)[kVec<T>], const Noise& noise, double std, double* z,
                           Result<T>* out) {
  const int lane = threadIdx.x % kWarp;
  if (chunk.count == 0) return;
  if (noise.mode != kNoNoise) {
    warp_normals(noise, chunk.element, chunk.count, z);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      const int column = chunk.column(lane, i);
      if (column < chunk.count) sum[i] = fma(std, z[column], sum[i]);
    }
  }
  struct alignas(16) Vector {
    Result<T> at[kVec<T>];
  };
  if (chunk.aligned) {  // so is the result, and its columns come in whole vectors
    Vector v;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) v.at[i] = static_cast<Result<T>>(sum[i]);
    if (lane * kVec<T> < chunk.count) reinterpret_cast<Vector*>(out + chunk.result)[lane] = v;
  } else {
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i)
      if (i * kWarp + lane < chunk.count) out[chunk.result + i * kWarp + lane] = static_cast<Result<T>>(sum[i]);
  }
}

}  // namespace adamix
