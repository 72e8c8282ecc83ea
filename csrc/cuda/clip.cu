// Clip factors, and the weighted sum of rows with noise: what follows the norms where the rows are read twice.

#include "clip.cuh"
#include "norm.cuh"

namespace adamix {
namespace {

constexpr int kThreads = 256;
// Rows whose loads a lane has under way.
template <class T, bool kAligned>
constexpr int kInFlight = kAligned ? 8 : 16 / kVec<T>;

// What the factor of a row is made of: `norm_sq` and the threshold, or the factors themselves.
struct Factors {
  const float* norm_sq;
  const double* given;
  Number threshold;

  __device__ double of(int64_t row, double t) const {
    return given ? given[row] : static_cast<double>(clip_factor(norm_sq[row], t));
  }
};

// Adds the usable of the rows start .. stop. A row whose factor is not above 0 is not read.
template <bool kAligned, class T>
__device__ void add_rows(const Chunk<T>& chunk, const Factors& factors, int64_t start, int64_t stop,
                         double (&sum)[kVec<T>]) {
  constexpr int kAtOnce = kInFlight<T, kAligned>;
  const int lane = threadIdx.x % kWarp;
  const double threshold = factors.given ? 0.0 : factors.threshold.get();
  for (int64_t first = start; first < stop; first += kWarp) {
    const double mine = first + lane < stop ? factors.of(first + lane, threshold) : 0.0;
    unsigned usable = __ballot_sync(kAll, mine > 0);
    while (usable) {
      uint4 values[kAtOnce];
      double factor[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = usable ? __ffs(usable) - 1 : -1;
        usable &= usable - 1;
        factor[i] = __shfl_sync(kAll, mine, row < 0 ? 0 : row);
        if (row < 0) factor[i] = 0;
        const T* from = chunk.row(first + (row < 0 ? 0 : row));
        const int count = row < 0 ? 0 : chunk.count;
        values[i] = kAligned ? load_vector(from, count, lane) : gather(from, count, lane);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        add_scaled<T>(values[i], factor[i], [](float x) { return static_cast<double>(x); }, sum);
    }
  }
}

// A warp takes a chunk of columns, or, where these are few (`split`), a block does, its warps one range of rows each.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)  // without the 2, ptxas saves registers on some devices, and spills
    sum_rows(List list, Factors factors, Noise noise, bool split, Result<T>* out) {
  constexpr int kColumns = Chunk<T>::kColumns;
  ADAMIX_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  double* z = reinterpret_cast<double*>(shared) + warp * kColumns;  // [kColumns], this warp's
  const int64_t index = split ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (index >= list.count * Chunk<T>::kParts) return;  // only whole blocks where split
  const Chunk<T> chunk(list, index / Chunk<T>::kParts, static_cast<int>(index % Chunk<T>::kParts));
  double sum[kVec<T>] = {};
  const int64_t start = split ? list.rows * warp / warps : 0;
  const int64_t stop = split ? list.rows * (warp + 1) / warps : list.rows;
  if (chunk.aligned)
    add_rows<true>(chunk, factors, start, chunk.count ? stop : start, sum);
  else
    add_rows<false>(chunk, factors, start, chunk.count ? stop : start, sum);
  if (split) {
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) z[i * kWarp + lane] = sum[i];
    __syncthreads();
    if (warp) return;
    for (int other = 1; other < warps; ++other)
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) sum[i] += z[other * kColumns + i * kWarp + lane];
  }
  finish_sum(chunk, sum, noise, noise.mode == kNoNoise ? 0.0 : noise.std(), z, out);
}

template <class T>
__global__ void __launch_bounds__(kThreads) clip_factors(const T* norm_sq, int64_t rows, Number threshold, float* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows) out[row] = clip_factor(norm_sq[row], threshold.get());
}

}  // namespace
}  // namespace adamix

using namespace adamix;

// out[c] = sum over b of factor[b] list[b, c], plus noise. Either `given` or `norm_sq` is null. `split`: see
// `sum_rows`.
ADAMIX_API adamix_clip_sum(int device, cudaStream_t stream, int32_t dtype, const List* list, const float* norm_sq,
                           const double* given, const Number* threshold, const Noise* noise, int32_t split, void* out) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess || list->count == 0) return on.error();
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWarps = kThreads / kWarp;
    const int64_t chunks = list->count * Chunk<T>::kParts;
    return launch(sum_rows<T>, grid_size(split ? chunks : (chunks + kWarps - 1) / kWarps), kThreads,
                  sizeof(double) * Chunk<T>::kColumns * kWarps, stream, false, *list,
                  Factors{norm_sq, given, *threshold}, *noise, split != 0, static_cast<Result<T>*>(out));
  });
}

// `dtype` of `norm_sq`: float32 or float64.
ADAMIX_API adamix_clip_factors(int device, cudaStream_t stream, int32_t dtype, const void* norm_sq, int64_t rows,
                               const Number* threshold, float* out) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess || rows == 0) return on.error();
  const unsigned grid = grid_size((rows + kThreads - 1) / kThreads);
  if (dtype == kFloat64)
    return launch(clip_factors<double>, grid, kThreads, 0, stream, false, static_cast<const double*>(norm_sq), rows,
                  *threshold, out);
  return launch(clip_factors<float>, grid, kThreads, 0, stream, false, static_cast<const float*>(norm_sq), rows,
                *threshold, out);
}
