// The Gaussian mechanism in one reading of the gradients, where the columns fit the multiprocessors' registers.
//
// Every block owns a slice of the columns for the whole call and keeps their float64 sums in registers. Groups of rows
// of the slice pass through shared memory, three at a time: while group g waits for its factors, which need the norms
// of whole rows and so every block's partial sums, the norms of group g + 1 are made and group g + 2 is on its way. A
// block says that it has published a group, and waits for all others only when it adds that group: by then they have.
//
// A thread copies to shared memory the very bytes that it reads back, so the copies need no barrier, only their wait.

#include <cuda_pipeline_primitives.h>

#include "clip.cuh"
#include "norm.cuh"

namespace adamix {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kStages = 3;    // groups in shared memory
constexpr int kRows = 16;     // most rows of a group
constexpr int kRing = 4;      // groups whose partial norms are kept: a block writes group g + 4 having waited for group
                              // g + 2, which every block published after it had read group g
constexpr int kSums = 32;     // float64 accumulators of a thread, in 64 registers
constexpr int kTogether = 4;  // rows whose sums go through a warp at once, so that they do not wait for each other
constexpr int kSmallest = 6;  // the stages fill at least 1 / kSmallest of the shared memory

template <class T>
constexpr int kSlots = kSums / kVec<T> < 8 ? kSums / kVec<T> : 8;  // most chunks of a warp

// How the work is cut; `grid` 0 where it does not fit. The kernel needs `scratch` doubles: the partial
// norms of `kRing` groups, and for each how many blocks have published theirs, ever.
struct Plan {
  int32_t grid, threads, slots, rows;
  int64_t shared, scratch;
};

// Shared memory before the stages.
template <class T>
struct alignas(16) Board {
  double sums[2][kRows][kMaxWarps];  // of a group's rows by warp; of even groups, of odd ones
  double factors[2][kRows];          // of a group's rows
  Chunk<T> chunks[kSlots<T> * kMaxWarps];
};

// x 2^-896 as a double for every finite float x, by its bits: a double's exponent has three bits more. Conversion
// instructions are too few for a sum at the speed of the memory; the factor takes the 2^896.
__device__ inline double shrunk(float x) {
  const uint32_t bits = __float_as_uint(x);
  return __hiloint2double((static_cast<int32_t>(bits) >> 3) & 0x8FFFFFFF, static_cast<int32_t>(bits << 29));
}

template <class T>
constexpr double kGrow = std::is_same_v<T, double> ? 1.0 : 0x1p896;

// A lane's 16 bytes of a row on their way to `to`, zeros beyond the chunk's end.
template <class T>
__device__ void copy_async(const Chunk<T>& chunk, int64_t row, int lane, uint4* to) {
  const T* from = chunk.row(row);
  if (chunk.aligned && lane * kVec<T> < chunk.count) {
    __pipeline_memcpy_async(to, from + lane * kVec<T>, 16);
  } else if (chunk.aligned || sizeof(T) < 4) {  // no asynchronous copy is as narrow as 2 bytes
    *to = chunk.aligned ? make_uint4(0, 0, 0, 0) : gather(from, chunk.count, lane);
  } else if constexpr (sizeof(T) >= 4) {
    T* each = reinterpret_cast<T*>(to);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      if (i * kWarp + lane < chunk.count)
        __pipeline_memcpy_async(each + i, from + i * kWarp + lane, sizeof(T));
      else
        each[i] = T{};
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    clip_sum_noise(List list, Plan plan, Number threshold, Noise noise, double terms, double* ring,
                   unsigned long long* published, float* norm_sq, Result<T>* out) {
  ADAMIX_DYNAMIC_SHARED(shared);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int threads = blockDim.x, warps = threads / kWarp, slots = plan.slots;
  Board<T>& board = *reinterpret_cast<Board<T>*>(shared);
  uint4* const stages = shared + sizeof(Board<T>) / sizeof(uint4);  // [kStages, rows, slots, threads]
  const int64_t groups = (list.rows + plan.rows - 1) / plan.rows;
  const auto rows_of = [&](int64_t group) {
    const int64_t left = list.rows - group * plan.rows;
    return static_cast<int>(left < plan.rows ? left : plan.rows);  // below 0 beyond the end
  };
  const auto stage = [&](int64_t group) { return stages + group % kStages * plan.rows * slots * threads + thread; };

  {
    const int64_t chunks = list.count * Chunk<T>::kParts;
    const int64_t first = chunks * blockIdx.x / gridDim.x, last = chunks * (blockIdx.x + 1) / gridDim.x;
    for (int slot = lane; slot < slots; slot += kWarp) {
      const int64_t index = first + slot * warps + warp;
      Chunk<T> chunk{};
      chunk.aligned = 1;  // an empty one is all zeros
      if (index < last) chunk = Chunk<T>(list, index / Chunk<T>::kParts, static_cast<int>(index % Chunk<T>::kParts));
      board.chunks[slot * warps + warp] = chunk;
    }
    __syncwarp();
  }

  const auto fetch = [&](int64_t group) {
    const int count = rows_of(group);
    uint4* to = stage(group);
    for (int row = 0; row < count; ++row)
      for (int slot = 0; slot < slots; ++slot, to += threads)
        copy_async(board.chunks[slot * warps + warp], group * plan.rows + row, lane, to);
    __pipeline_commit();  // an empty group too: the waits count them
  };

  // Says what this block's slice adds to the norms of a group.
  const auto publish = [&](int64_t group) {
    const int count = rows_of(group);
    const uint4* at = stage(group);
    for (int first = 0; first < count; first += kTogether) {
      double sum[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (first + i < count) {
#pragma unroll 4
          for (int slot = 0; slot < slots; ++slot, at += threads) sum[i] += sum_sq<T>(*at);
        }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sum[i] = warp_sum(sum[i]);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (lane == i && first + i < count) board.sums[group % 2][first + i][warp] = sum[i];
    }
    __syncthreads();
    if (warp) return;
    if (lane < count) {
      double sum = 0;
      for (int w = 0; w < warps; ++w) sum += board.sums[group % 2][lane][w];
      ring[(group % kRing * kRows + lane) * gridDim.x + blockIdx.x] = sum;
      __threadfence();
    }
    __syncwarp();
    if (lane == 0) atomicAdd(published + group % kRing, 1ull);
  };

  // The factors of a group, the same in every block: the partial norms are added in the same order.
  const double limit = threshold.get();
  const auto make_factors = [&](int64_t group) {
    const int count = rows_of(group);
    for (int row = warp; row < count; row += warps) {
      if (lane == 0) {
        const auto all = static_cast<unsigned long long>(group / kRing + 1) * gridDim.x;
        while (*const_cast<volatile unsigned long long*>(published + group % kRing) < all) __nanosleep(32);
        __threadfence();
      }
      __syncwarp();
      const double* partial = ring + (group % kRing * kRows + row) * gridDim.x;
      double sum = 0;
      for (unsigned block = lane; block < gridDim.x; block += kWarp) sum += __ldcg(partial + block);
      sum = warp_sum(sum);
      if (lane == 0) {
        const float norm = round_up_norm(sum, terms, !std::is_same_v<T, double>);
        board.factors[group % 2][row] = clip_factor(norm, limit) * kGrow<T>;
        if (blockIdx.x == 0) norm_sq[group * plan.rows + row] = norm;
      }
    }
    __syncthreads();
  };

  double sums[kSlots<T>][kVec<T>] = {};
  const auto add_group = [&](int64_t group) {
    const int count = rows_of(group);
    const uint4* at = stage(group);
    for (int row = 0; row < count; ++row, at += slots * threads) {
      const double factor = board.factors[group % 2][row];
      if (!(factor > 0)) continue;
#pragma unroll
      for (int slot = 0; slot < kSlots<T>; ++slot)
        if (slot < slots) add_scaled<T>(at[slot * threads], factor, shrunk, sums[slot]);
    }
  };

  for (int group = 0; group < kStages - 1; ++group) fetch(group);
  for (int64_t group = -1; group < groups; ++group) {
    if (group + 1 < groups) {
      __pipeline_wait_prior(kStages - 2);
      __syncwarp();  // the wait alone does not keep the compiler from reading before it
      publish(group + 1);
    }
    if (group >= 0) {
      make_factors(group);
      add_group(group);
    }
    fetch(group + kStages);
  }

  // Registers have no index at run time, and noise needs many: the sums move to where the stages were.
  __syncthreads();
  const double std = noise.mode == kNoNoise ? 0.0 : noise.std();
  double* const moved = reinterpret_cast<double*>(stages) + warp * slots * Chunk<T>::kColumns;  // [slots, kColumns]
#pragma unroll
  for (int slot = 0; slot < kSlots<T>; ++slot)
    if (slot < slots) {
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) moved[slot * Chunk<T>::kColumns + i * kWarp + lane] = sums[slot][i];
    }
#pragma unroll 1
  for (int slot = 0; slot < slots; ++slot) {
    double* const own = moved + slot * Chunk<T>::kColumns;  // read back by the same thread, then free for normals
    double sum[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) sum[i] = own[i * kWarp + lane];
    finish_sum(board.chunks[slot * warps + warp], sum, noise, std, own, out);
  }
}

struct Device {
  int multiprocessors = 0, shared = 0, cooperative = 0;
};

cudaError_t describe(int device, Device& found) {
  cudaError_t error = cudaDeviceGetAttribute(&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found.cooperative, cudaDevAttrCooperativeLaunch, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return error;
}

template <class T>
cudaError_t make_plan(int device, int64_t blocks, int64_t rows, Plan& plan) {
  plan = {};
  Device found;
  cudaError_t error = describe(device, found);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, clip_sum_noise<T>);
  if (error != cudaSuccess || !found.cooperative) return error;
  const int64_t chunks = blocks * Chunk<T>::kParts, sms = found.multiprocessors;
  const int64_t most_warps = attributes.maxThreadsPerBlock / kWarp;
  const int64_t share = (chunks + sms - 1) / sms;  // chunks of a block
  if (chunks == 0 || rows == 0 || share > most_warps * kSlots<T>) return cudaSuccess;
  const int64_t slots = (share + most_warps - 1) / most_warps, warps = (share + slots - 1) / slots;
  const int64_t threads = warps * kWarp;
  const int64_t row = kStages * slots * threads * static_cast<int64_t>(sizeof(uint4));
  const int64_t moved = slots * threads * kVec<T> * static_cast<int64_t>(sizeof(double));
  const int64_t room = found.shared - static_cast<int64_t>(sizeof(Board<T>) + attributes.sharedSizeBytes);
  int64_t group = room / row;
  group = group < kRows ? group : kRows;
  group = group < rows ? group : rows;
  // Groups too small to keep the memory busy wait for one another longer than a second reading takes.
  if (group < 1 || moved > room || group * row * kSmallest < found.shared) return cudaSuccess;
  plan.grid = static_cast<int32_t>((chunks + share - 1) / share);
  plan.threads = static_cast<int32_t>(threads);
  plan.slots = static_cast<int32_t>(slots);
  plan.rows = static_cast<int32_t>(group);
  plan.shared = static_cast<int64_t>(sizeof(Board<T>)) + (group * row > moved ? group * row : moved);
  plan.scratch = int64_t{kRing} * (kRows * plan.grid + 1);
  // Always all there is: the limit belongs to the function, and another thread may be launching a larger plan.
  return cudaFuncSetAttribute(clip_sum_noise<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              found.shared - static_cast<int>(attributes.sharedSizeBytes));
}

}  // namespace
}  // namespace adamix

using namespace adamix;

// How to run `adamix_clip_sum_resident` for a list of so many blocks and rows, or `grid` 0 if it cannot.
ADAMIX_API adamix_clip_sum_plan(int device, int32_t dtype, int64_t blocks, int64_t rows, Plan* plan) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  return dispatch(
      dtype, [&](auto* type) { return make_plan<std::remove_pointer_t<decltype(type)>>(device, blocks, rows, *plan); });
}

// Norms, factors, sum and noise of a whole list, which is of one type. `scratch`: plan->scratch doubles.
ADAMIX_API adamix_clip_sum_resident(int device, cudaStream_t stream, int32_t dtype, const List* list, const Plan* plan,
                                    const Number* threshold, const Noise* noise, double terms, double* scratch,
                                    float* norm_sq, void* out) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  auto* published = reinterpret_cast<unsigned long long*>(scratch + plan->scratch - kRing);
  if (const cudaError_t error = cudaMemsetAsync(published, 0, kRing * sizeof *published, stream)) return error;
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(clip_sum_noise<T>, plan->grid, plan->threads, plan->shared, stream, true, *list, *plan, *threshold,
                  *noise, terms, scratch, published, norm_sq, static_cast<Result<T>*>(out));
  });
}
