// Gaussian noise in place, for a whole list of tensors at once.

#include "noise.cuh"

namespace adamix {
namespace {

constexpr int kThreads = 128;
constexpr int kElements = 512;  // that a warp takes: whole blocks of either stream, for offsets that are multiples of 8

__device__ double widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ double widen(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ double widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// To nearest even, half precision by way of float as torch does it.
template <class T>
__device__ T narrow(double x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = __float_as_uint(static_cast<float>(x));
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FC0};
    return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {__half_as_ushort(__float2half_rn(static_cast<float>(x)))};
  } else {
    return static_cast<T>(x);
  }
}

template <class T>
struct alignas(16) Vector {
  T at[kVec<T>];
};

template <class T>
__global__ void __launch_bounds__(kThreads) add_noise(List list, Noise noise) {
  ADAMIX_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  double* z = reinterpret_cast<double*>(shared) + warp * kElements;  // [kElements], this warp's
  constexpr int kParts = kBlock / kElements;
  const int64_t tasks = list.count * kParts, step = static_cast<int64_t>(gridDim.x) * warps;
  const double std = noise.std();
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * warps + warp; task < tasks; task += step) {
    const int32_t* block = list.blocks + 2 * (task / kParts);
    const int64_t* tensor = list.table + 4 * static_cast<int64_t>(block[0]);
    const int64_t start = static_cast<int64_t>(block[1]) * kBlock + task % kParts * kElements;
    if (start >= tensor[1]) continue;
    const int count = static_cast<int>(tensor[1] - start < kElements ? tensor[1] - start : kElements);
    T* data = reinterpret_cast<T*>(tensor[0]) + start;
    warp_normals(noise, tensor[2] + start, count, z);
    const int whole = tensor[0] % 16 == 0 ? count / kVec<T> : 0;  // vectors of 16 bytes
    for (int i = lane; i < whole; i += kWarp) {
      Vector<T>* at = reinterpret_cast<Vector<T>*>(data) + i;
      Vector<T> v = *at;
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) v.at[j] = narrow<T>(fma(std, z[i * kVec<T> + j], widen(v.at[j])));
      *at = v;
    }
    for (int i = whole * kVec<T> + lane; i < count; i += kWarp) data[i] = narrow<T>(fma(std, z[i], widen(data[i])));
  }
}

}  // namespace
}  // namespace adamix

using namespace adamix;

// Adds a draw of noise to the tensors [1, *] of a list.
ADAMIX_API adamix_add_noise(int device, cudaStream_t stream, int32_t dtype, const List* list, const Noise* noise) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess || list->count == 0) return on.error();
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t warps = list->count * (kBlock / kElements), per_block = kThreads / kWarp;
    return launch(add_noise<T>, grid_size((warps + per_block - 1) / per_block), kThreads,
                  per_block * kElements * sizeof(double), stream, false, *list, *noise);
  });
}
