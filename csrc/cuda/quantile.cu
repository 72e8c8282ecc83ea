// An order statistic by its bits: the digits of the answer one after another, most significant first, by counting.

#include "common.cuh"

namespace adamix {
namespace {

constexpr int kThreads = 1024;
constexpr int kDigits = 256;

// Bits in the order of the numbers; every NaN after all of them.
__device__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0xFFFFFFFFu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ uint64_t ordered(double x) {
  const uint64_t bits = __double_as_longlong(x), sign = uint64_t{1} << 63;
  return x != x ? ~uint64_t{0} : bits & sign ? ~bits : bits | sign;
}
__device__ double number(uint32_t key) { return as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }
__device__ double number(uint64_t key) {
  const uint64_t sign = uint64_t{1} << 63;
  return __longlong_as_double(static_cast<long long>(key & sign ? key & ~sign : ~key));
}

// out = square root of the rank-th smallest value, by one block.
template <class T>
__global__ void __launch_bounds__(kThreads) kth_root(const T* values, int64_t count, int64_t rank, float* out) {
  using Key = decltype(ordered(T{}));
  ADAMIX_DYNAMIC_SHARED(shared);
  auto* counts = reinterpret_cast<unsigned long long*>(shared);  // [kDigits], then the digit and the rank in it
  unsigned long long* found = counts + kDigits;
  const int lane = threadIdx.x % kWarp;
  Key prefix = 0;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) counts[digit] = 0;
    __syncthreads();
    const Key above = shift + 8 < static_cast<int>(8 * sizeof(Key)) ? ~Key{0} << (shift + 8) % (8 * sizeof(Key)) : 0;
    for (int64_t start = 0; start < count; start += blockDim.x) {  // whole warps: they count together
      const int64_t i = start + threadIdx.x;
      const Key key = i < count ? ordered(values[i]) : 0;
      const bool same = i < count && ((key ^ prefix) & above) == 0;
      const int digit = same ? static_cast<int>(key >> shift) & (kDigits - 1) : kDigits;
      const unsigned peers = __match_any_sync(kAll, digit);  // one atomic for all lanes with a digit
      if (same && lane == __ffs(peers) - 1) atomicAdd(counts + digit, static_cast<unsigned long long>(__popc(peers)));
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      constexpr int kEach = kDigits / kWarp;
      unsigned long long mine = 0;
      for (int i = 0; i < kEach; ++i) mine += counts[lane * kEach + i];
      unsigned long long upto = mine;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const unsigned long long below = __shfl_up_sync(kAll, upto, step);
        if (lane >= step) upto += below;
      }
      const auto wanted = static_cast<unsigned long long>(rank);
      unsigned long long below = upto - mine;
      if (below < wanted && wanted <= upto) {
        int digit = lane * kEach;
        while (below + counts[digit] < wanted) below += counts[digit++];
        found[0] = digit;
        found[1] = wanted - below;
      }
    }
    __syncthreads();
    prefix |= static_cast<Key>(found[0]) << shift;
    rank = static_cast<int64_t>(found[1]);  // written again only after two more barriers
  }
  if (threadIdx.x == 0) *out = static_cast<float>(sqrt(number(prefix)));
}

template <class T>
cudaError_t run(const void* values, int64_t count, int64_t rank, float* out, cudaStream_t stream) {
  return launch(kth_root<T>, 1, kThreads, (kDigits + 2) * sizeof(unsigned long long), stream, false,
                static_cast<const T*>(values), count, rank, out);
}

}  // namespace
}  // namespace adamix

using namespace adamix;

// Square root of the rank-th smallest of `count` values, float32 or float64.
ADAMIX_API adamix_norm_quantile(int device, cudaStream_t stream, int32_t dtype, const void* values, int64_t count,
                                int64_t rank, float* out) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  return dtype == kFloat64 ? run<double>(values, count, rank, out, stream)
                           : run<float>(values, count, rank, out, stream);
}

ADAMIX_API adamix_multiprocessors(int device, int* count) {
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

extern "C" __attribute__((visibility("default"))) const char* adamix_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
