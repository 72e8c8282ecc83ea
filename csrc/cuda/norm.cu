// Squared norms of rows, in two launches: partial sums of slices of each row, then their sum in order.

#include "norm.cuh"

namespace adamix {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // loads of 16 bytes a lane has under way

// A warp takes a slice (a range of the list's blocks) of a row. `norm_sq` is written where a row is one slice, else
// partials [row, first + slice] of rows that are `total` long.
template <class T>
__global__ void __launch_bounds__(kThreads) partial_norms(List list, int64_t slices, int64_t first, int64_t total,
                                                          double* partials, double terms, float* norm_sq) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  int64_t task = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  for (; task < list.rows * slices; task += warps) {
    // Neighbouring warps take neighbouring slices of a row.
    const int64_t row = task / slices, slice = task % slices;
    const int64_t start = list.count * slice / slices, stop = list.count * (slice + 1) / slices;
    double sum = 0;
    for (int64_t block = start; block < stop; ++block) {
      const Chunk<T> whole(list, block, 0, kBlock);
      for (int part = 0; part < Chunk<T>::kParts; part += kInFlight) {
        static_assert(Chunk<T>::kParts % kInFlight == 0);
        const T* from = whole.row(row) + part * Chunk<T>::kColumns;
        const int count = whole.count - part * Chunk<T>::kColumns;
        uint4 values[kInFlight];
        if (whole.aligned) {
#pragma unroll
          for (int i = 0; i < kInFlight; ++i)
            values[i] = load_vector(from + i * Chunk<T>::kColumns, count - i * Chunk<T>::kColumns, lane);
        } else {
#pragma unroll
          for (int i = 0; i < kInFlight; ++i)
            values[i] = gather(from + i * Chunk<T>::kColumns, count - i * Chunk<T>::kColumns, lane);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) sum += sum_sq<T>(values[i]);
      }
    }
    sum = warp_sum(sum);
    if (lane) continue;
    if (norm_sq)
      norm_sq[row] = round_up_norm(sum, terms, !std::is_same_v<T, double>);
    else
      partials[row * total + first + slice] = sum;
  }
}

// A warp adds the slices of a row.
__global__ void __launch_bounds__(kThreads)
    finish_norms(const double* partials, int64_t rows, int64_t total, double terms, bool narrow, float* norm_sq) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  double sum = 0;
  for (int64_t i = lane; i < total; i += kWarp) sum += partials[row * total + i];
  sum = warp_sum(sum);
  if (lane == 0) norm_sq[row] = round_up_norm(sum, terms, narrow);
}

int64_t blocks_for(int64_t warps) { return (warps + kThreads / kWarp - 1) / (kThreads / kWarp); }

}  // namespace
}  // namespace adamix

using namespace adamix;

// Sums of squares of `slices` slices of each row; see `partial_norms`. `terms`: columns of the whole list.
ADAMIX_API adamix_partial_norms(int device, cudaStream_t stream, int32_t dtype, const List* list, int64_t slices,
                                int64_t first, int64_t total, double* partials, double terms, float* norm_sq) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(partial_norms<T>, grid_size(blocks_for(list->rows * slices)), kThreads, 0, stream, false, *list,
                  slices, first, total, partials, terms, norm_sq);
  });
}

ADAMIX_API adamix_finish_norms(int device, cudaStream_t stream, const double* partials, int64_t rows, int64_t total,
                               double terms, int32_t narrow, float* norm_sq) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  return launch(finish_norms, grid_size(blocks_for(rows)), kThreads, 0, stream, false, partials, rows, total, terms,
                narrow != 0, norm_sq);
}
