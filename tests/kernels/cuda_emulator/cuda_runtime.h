// Runs CUDA C++ on a CPU: `g++ -x c++ -std=c++20 -I <this folder>` compiles the kernels' own sources against these
// headers instead of CUDA's. It shows what is wrong with indices, barriers, shuffles and asynchronous copies; it says
// nothing of speed, nor of the order in which a GPU's memory shows one block's writes to another.
//
// A resident block of a cooperative launch is an operating system thread, a CUDA thread a fiber of it; the blocks of
// other launches run one after another. Fibers run in random order from one barrier to the next, so that a missing one
// is seen. Shared memory begins as NaN and has a fence behind it; an asynchronous copy arrives when it is waited for
// and not before, and until then its target is NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define ADAMIX_DYNAMIC_SHARED(name) uint4* const name = emulator::dynamic_shared()

struct dim3 {
  unsigned x;
  dim3(unsigned size = 1) : x(size) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

struct Device {
  int multiprocessors = 3, shared = 24 << 10, threads = 64, cooperative = 1;
  unsigned seed = 0;
  long long launches = 0, cooperative_launches = 0;
};
inline Device device;
inline std::atomic<bool> failed{false};
inline std::string message;

inline void fail(const char* text) {
  if (!failed.exchange(true)) message = text;
}

enum class State { kReady, kWarp, kBlock, kDone };
enum class Exchange { kSync, kShuffle, kBallot, kMatch };

struct Copy {
  void* to;
  const void* from;
  size_t size;
  int group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  State state = State::kReady;
  Exchange exchange = Exchange::kSync;
  unsigned linear = 0;
  unsigned long long given = 0, taken[32] = {};
  std::vector<Copy> copies;
  int groups = 0;
  long long naps = 0;
  std::vector<char> stack = std::vector<char>(64 << 10);
};

constexpr size_t kFence = 256;
constexpr unsigned char kFenceByte = 0xA5;

struct Block {
  jmp_buf scheduler;
  std::vector<Fiber*> fibers;
  Fiber* current = nullptr;
  unsigned index = 0, size = 0, grid = 0;
  std::vector<uint4> shared;
  std::mt19937 random;
  const std::function<void()>* body = nullptr;
  bool reorder = false;

  ~Block() {
    for (Fiber* fiber : fibers) delete fiber;
  }
};
inline thread_local Block* running = nullptr;
// Not inlined: a fiber must not keep what it found before a switch.
inline __attribute__((noinline)) Block& block() { return *running; }
inline __attribute__((noinline)) uint4* dynamic_shared() { return block().shared.data(); }

inline __attribute__((noinline)) void leave(State state) {
  Block& b = block();
  Fiber& fiber = *b.current;
  fiber.state = state;
  if (!_setjmp(fiber.at)) _longjmp(b.scheduler, 1);
}

inline void enter() {
  (*block().body)();
  leave(State::kDone);
}

inline __attribute__((noinline)) void resume(Block& b, Fiber& fiber) {
  b.current = &fiber;
  if (_setjmp(b.scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets a warp go on if all its threads that are left wait for one another.
inline bool release_warp(Block& b, unsigned first, unsigned last) {
  unsigned waiting = 0, alive = 0;
  for (unsigned i = first; i < last; ++i) {
    waiting += b.fibers[i]->state == State::kWarp;
    alive += b.fibers[i]->state != State::kDone;
  }
  if (!waiting || waiting != alive) return false;
  unsigned long long given[32] = {};
  const Fiber* one = nullptr;
  for (unsigned i = first; i < last; ++i) {
    if (b.fibers[i]->state != State::kWarp) continue;
    given[i - first] = b.fibers[i]->given;
    if (one && one->exchange != b.fibers[i]->exchange) fail("threads of a warp meet in different operations");
    one = b.fibers[i];
  }
  for (unsigned i = first; i < last; ++i)
    if (b.fibers[i]->state == State::kWarp) {
      std::memcpy(b.fibers[i]->taken, given, sizeof given);
      b.fibers[i]->state = State::kReady;
    }
  return true;
}

inline void run_block(Block& b, unsigned index, unsigned grid, unsigned size, size_t shared,
                      const std::function<void()>& body) {
  running = &b;
  const unsigned n = size, warps = (n + 31) / 32;
  b.index = index, b.size = size, b.grid = grid, b.body = &body;
  b.random.seed(device.seed * 977 + index);
  b.shared.assign((shared + 15) / 16 + kFence / 16, uint4{~0u, ~0u, ~0u, ~0u});
  std::memset(reinterpret_cast<char*>(b.shared.data()) + shared, kFenceByte, kFence);
  while (b.fibers.size() < n) b.fibers.push_back(new Fiber);
  for (unsigned i = 0; i < n; ++i) {
    Fiber& fiber = *b.fibers[i];
    fiber.linear = i, fiber.state = State::kReady, fiber.started = false;
    fiber.copies.clear(), fiber.groups = 0, fiber.naps = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.start, enter, 0);
  }
  std::vector<unsigned> order(warps), lanes;
  for (unsigned i = 0; i < warps; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), b.random);
  while (!failed) {
    if (b.reorder || b.random() % 16 == 0) std::shuffle(order.begin(), order.end(), b.random);
    b.reorder = false;
    bool ran = false;  // the first warp that can runs to its next barrier: some get far ahead of the others
    for (unsigned warp : order) {
      lanes.clear();
      for (unsigned i = warp * 32; i < std::min(n, warp * 32 + 32); ++i)
        if (b.fibers[i]->state == State::kReady) lanes.push_back(i);
      if (lanes.empty()) continue;
      std::shuffle(lanes.begin(), lanes.end(), b.random);
      for (unsigned i : lanes) resume(b, *b.fibers[i]);
      ran = true;
      release_warp(b, warp * 32, std::min(n, warp * 32 + 32));
      break;
    }
    if (ran) continue;
    unsigned done = 0, waiting = 0;
    for (unsigned i = 0; i < n; ++i) {
      done += b.fibers[i]->state == State::kDone;
      waiting += b.fibers[i]->state == State::kBlock;
    }
    if (done == n) break;
    if (waiting != n - done) fail("threads of a block wait at different barriers");
    if (done) fail("__syncthreads after threads of the block have returned");
    for (unsigned i = 0; i < n; ++i) b.fibers[i]->state = State::kReady;
  }
  const auto* fence = reinterpret_cast<unsigned char*>(b.shared.data()) + shared;
  if (std::any_of(fence, fence + kFence, [](unsigned char c) { return c != kFenceByte; }))
    fail("a write beyond the end of shared memory");
}

inline unsigned long long exchange(Exchange kind, unsigned long long value) {
  Fiber& fiber = *block().current;
  fiber.exchange = kind;
  fiber.given = value;
  leave(State::kWarp);
  return 0;
}

template <class T>
T shuffle(T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  exchange(Exchange::kShuffle, bits);
  std::memcpy(&value, &block().current->taken[from % 32], sizeof value);
  return value;
}

inline unsigned lane() { return block().current->linear % 32; }

}  // namespace emulator

template <class F>
struct BuiltIn {
  struct {
    operator unsigned() const { return F()(); }
  } x;
};
inline const BuiltIn<decltype([] { return emulator::block().current->linear; })> threadIdx;
inline const BuiltIn<decltype([] { return emulator::block().index; })> blockIdx;
inline const BuiltIn<decltype([] { return emulator::block().size; })> blockDim;
inline const BuiltIn<decltype([] { return emulator::block().grid; })> gridDim;

inline void __syncthreads() { emulator::leave(emulator::State::kBlock); }
inline void __syncwarp(unsigned = ~0u) { emulator::exchange(emulator::Exchange::kSync, 0); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __nanosleep(unsigned) {
  emulator::Block& b = emulator::block();
  if (++b.current->naps > 2'000'000) emulator::fail("a wait between blocks never ends");
  b.reorder = true;
  std::this_thread::yield();
  emulator::leave(emulator::State::kReady);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulator::shuffle(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, emulator::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle(value, lane < delta ? lane : lane - delta);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  emulator::exchange(emulator::Exchange::kBallot, predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(emulator::block().current->taken[i]) << i;
  return bits;
}
inline unsigned __match_any_sync(unsigned, int value) {
  const auto mine = static_cast<unsigned long long>(value);
  emulator::exchange(emulator::Exchange::kMatch, mine);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(emulator::block().current->taken[i] == mine) << i;
  return bits;
}
template <class T>
T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value);
}
template <class T>
T __ldg(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(T)) emulator::fail("a misaligned load");
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *const_cast<const volatile T*>(at);
}

template <class To, class From>
To emulated_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline double __hiloint2double(int high, int low) {
  return emulated_bits<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}
inline float __double2float_ru(double x) {
  const float y = static_cast<float>(x);
  return y < x ? std::nextafterf(y, INFINITY) : y;
}
inline float __double2float_rd(double x) {
  const float y = static_cast<float>(x);
  return y > x ? std::nextafterf(y, -INFINITY) : y;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  shift %= 32;
  return shift ? high << shift | low >> (32 - shift) : high;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// --- The runtime's functions that launchers call
// ----------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure, cudaErrorCooperativeLaunchTooLarge };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrCooperativeLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
using cudaStream_t = void*;
struct cudaFuncAttributes {
  size_t sharedSizeBytes = 0;
  int maxThreadsPerBlock = 0;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::message.c_str() : "the emulator refuses the call";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::Device& device = emulator::device;
  *value = attribute == cudaDevAttrMultiProcessorCount ? device.multiprocessors
           : attribute == cudaDevAttrCooperativeLaunch ? device.cooperative
                                                       : device.shared;
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
  *attributes = {0, emulator::device.threads};
  return cudaSuccess;
}
namespace emulator {
// Dynamic shared memory that kernels asked for; 48 KiB are granted unasked.
inline std::map<const void*, int> granted;
inline int grant(const void* kernel) { return granted.count(kernel) ? granted[kernel] : 48 << 10; }
}  // namespace emulator
template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulator::device.shared) return cudaErrorInvalidValue;
  emulator::granted[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const unsigned blocks = config->gridDim.x;
  const bool cooperative = config->numAttrs && config->attrs[0].val.cooperative;
  if (!blocks || !config->blockDim.x || config->blockDim.x > 1024) return cudaErrorInvalidValue;
  if (static_cast<int>(config->dynamicSmemBytes) > emulator::grant(reinterpret_cast<const void*>(kernel)))
    return cudaErrorInvalidValue;
  if (cooperative && static_cast<int>(blocks) > emulator::device.multiprocessors)
    return cudaErrorCooperativeLaunchTooLarge;
  const std::function<void()> body = [=] { kernel(arguments...); };
  const auto run = [&](emulator::Block& b, unsigned index) {
    emulator::run_block(b, index, blocks, config->blockDim.x, config->dynamicSmemBytes, body);
  };
  emulator::failed = false;
  ++emulator::device.launches;
  if (cooperative) {
    ++emulator::device.cooperative_launches;
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < blocks; ++i)
      threads.emplace_back([&, i] {
        emulator::Block own;
        run(own, i);
      });
    for (std::thread& thread : threads) thread.join();
  } else {
    static emulator::Block reused;
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::mt19937(emulator::device.seed));
    for (unsigned i : order) run(reused, i);
  }
  return emulator::failed ? cudaErrorLaunchFailure : cudaSuccess;
}
