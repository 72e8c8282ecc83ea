// What the kernels share: element types, pieces of a list of tensors, reductions in fixed order, launches.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#define ADAMIX_API extern "C" __attribute__((visibility("default"))) int
#ifndef ADAMIX_DYNAMIC_SHARED  // the emulator of the tests has its own
#define ADAMIX_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

namespace adamix {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kBlock = 1024;  // columns of an entry of a list's table of blocks: `_BLOCK` in adamix_kernels/cuda.py

enum DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The tensors [rows, *] of one type as device_lists.py describes them: `table` [n, 4] of address, columns, offset in
// the list as one vector, offset in the result; `blocks` [count, 2] of tensor, block of columns.
struct List {
  const int64_t* table;
  const int32_t* blocks;
  int64_t count;
  int64_t rows;
};

// A number of the caller's, or one in device memory that the host has not seen.
struct Number {
  const double* at;
  double value;

  __device__ double get() const { return at ? *at : value; }
};

template <class T>
using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of 16 bytes, what a thread loads at once.
template <class T>
constexpr int kVec = 16 / sizeof(T);

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }

// The elements of 16 bytes as float, exactly.
template <class T>
__device__ void unpack(uint4 v, float (&x)[kVec<T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = as_float(words[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      x[2 * i] = as_float(words[i] << 16);
      x[2 * i + 1] = as_float(words[i] & 0xFFFF0000u);
    } else {
      x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i])));
      x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
    }
  }
}

__device__ inline void unpack(uint4 v, double (&x)[2]) {
  x[0] = __hiloint2double(v.y, v.x);
  x[1] = __hiloint2double(v.w, v.z);
}

// Sum of the squares of 16 bytes of elements. Narrow types: four at a time in float, each operation rounding once, so
// that the exact sum is at most (1 + 5 2^-24) of this plus 2^-149 per element; see `round_up_norm`.
template <class T>
__device__ double sum_sq(uint4 v) {
  if constexpr (std::is_same_v<T, double>) {
    double x[2];
    unpack(v, x);
    return fma(x[1], x[1], x[0] * x[0]);
  } else {
    float x[kVec<T>];
    unpack<T>(v, x);
    double total = 0;
#pragma unroll
    for (int i = 0; i < kVec<T>; i += 4)
      total += fmaf(x[i + 3], x[i + 3], fmaf(x[i + 2], x[i + 2], fmaf(x[i + 1], x[i + 1], x[i] * x[i])));
    return total;
  }
}

// The same in all lanes.
__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// Columns of a list that a warp takes: 32 kVec, a part of a block, or the whole of one.
template <class T>
struct Chunk {
  static constexpr int kColumns = kWarp * kVec<T>;
  static constexpr int kParts = kBlock / kColumns;

  const T* data;    // the first column in row 0
  int64_t stride;   // elements from row to row
  int64_t element;  // where the first column is in the list as one vector
  int64_t result;   // and in the result
  int32_t count;    // columns; 0 beyond a tensor's end
  int32_t aligned;  // whether each row may be read 16 bytes at a time

  Chunk() = default;
  __device__ Chunk(const List& list, int64_t block, int part, int columns = kColumns) {
    const int32_t* at = list.blocks + 2 * block;
    const int64_t* tensor = list.table + 4 * static_cast<int64_t>(at[0]);
    const int64_t start = static_cast<int64_t>(at[1]) * kBlock + part * kColumns;
    const int64_t left = tensor[1] - start;
    count = static_cast<int32_t>(left < 0 ? 0 : left < columns ? left : columns);
    stride = tensor[1];
    aligned = tensor[0] % 16 == 0 && stride % kVec<T> == 0;
    data = reinterpret_cast<const T*>(tensor[0]) + start;
    element = tensor[2] + start;
    result = tensor[3] + start;
  }

  // The chunk's column that is element i of a lane: a lane's elements are neighbours where they are loaded at once,
  // else 32 apart, so that neighbouring lanes load neighbouring elements.
  __device__ int column(int lane, int i) const { return aligned ? lane * kVec<T> + i : i * kWarp + lane; }

  // Where a row of the chunk begins.
  __device__ const T* row(int64_t index) const { return data + index * stride; }
};

// A lane's elements of a chunk's row of `count` columns that is aligned; 0 beyond the end.
template <class T>
__device__ uint4 load_vector(const T* from, int64_t count, int lane) {
  return lane * kVec<T> < count ? __ldg(reinterpret_cast<const uint4*>(from) + lane) : make_uint4(0, 0, 0, 0);
}

// The same of one that is not.
template <class T>
__device__ uint4 gather(const T* from, int64_t count, int lane) {
  using Bits = std::conditional_t<sizeof(T) == 2, unsigned short,
                                  std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>>;
  const Bits* bits = reinterpret_cast<const Bits*>(from);
  unsigned long long words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
    const int at = i * kWarp + lane;
    const unsigned long long x = at < count ? __ldg(bits + at) : 0;
    words[i / (kVec<T> / 2)] |= x << (i % (kVec<T> / 2) * 8 * static_cast<int>(sizeof(T)));
  }
  return make_uint4(static_cast<unsigned>(words[0]), static_cast<unsigned>(words[0] >> 32),
                    static_cast<unsigned>(words[1]), static_cast<unsigned>(words[1] >> 32));
}

// Calls `body` with a null pointer of the element type.
template <class F>
cudaError_t dispatch(int32_t dtype, F body) {
  switch (dtype) {
    case kFloat32: return body(static_cast<float*>(nullptr));
    case kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    case kFloat16: return body(static_cast<Float16*>(nullptr));
    case kFloat64: return body(static_cast<double*>(nullptr));
    default: return cudaErrorInvalidValue;
  }
}

// Makes a device current for the calls of one launcher.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = true;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int before_ = 0;
  bool changed_ = false;
};

inline unsigned grid_size(int64_t blocks) {
  constexpr int64_t kMost = 0x7FFFFFFF;  // every kernel of a larger grid would have to take more than one turn
  return static_cast<unsigned>(blocks < kMost ? blocks : kMost);
}

// `all_resident`: fails unless every block of the grid can run at the same time.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned grid, unsigned threads, size_t shared, cudaStream_t stream,
                   bool all_resident, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = all_resident ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace adamix
