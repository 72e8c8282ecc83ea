// Counter-based Gaussian noise: the values of adamix_kernels/ops/noise.py, made by whole warps.
#pragma once

#include "../normal.h"
#include "common.cuh"

namespace adamix {

enum NoiseMode : int32_t { kNoNoise, kPhilox, kChaCha20 };

// `factor` times the number `unit` is the standard deviation.
struct Noise {
  uint32_t key[8];
  uint64_t draw;
  double factor;
  Number unit;
  int32_t mode;

  __device__ double std() const { return factor * unit.get(); }
};

// Philox4x32-10 (Salmon et al. 2011).
__device__ inline void philox(const Noise& noise, uint64_t block, uint32_t (&c)[4]) {
  c[0] = static_cast<uint32_t>(block);
  c[1] = static_cast<uint32_t>(block >> 32);
  c[2] = static_cast<uint32_t>(noise.draw);
  c[3] = static_cast<uint32_t>(noise.draw >> 32);
  uint32_t k0 = noise.key[0], k1 = noise.key[1];
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
  }
}

__device__ inline void mix(uint32_t& a, uint32_t b, uint32_t& d, int bits) {
  a += b;
  d = __funnelshift_l(d ^ a, d ^ a, bits);
}

__device__ inline void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  mix(a, b, d, 16);
  mix(c, d, b, 12);
  mix(a, b, d, 8);
  mix(c, d, b, 7);
}

// A block of ChaCha20 (RFC 8439): 16 words.
__device__ inline void chacha20(const Noise& noise, uint64_t block, uint32_t (&x)[16]) {
  const auto start = [&](int i) -> uint32_t {
    constexpr uint32_t kConstants[4] = {0x61707865u, 0x3320646Eu, 0x79622D32u, 0x6B206574u};
    if (i < 4) return kConstants[i];
    if (i < 12) return noise.key[i - 4];
    const uint64_t word = i < 14 ? block : noise.draw;
    return static_cast<uint32_t>(i % 2 ? word >> 32 : word);
  };
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = start(i);
#pragma unroll 1
  for (int round = 0; round < 10; ++round)
#pragma unroll
    for (int diagonal = 0; diagonal < 2; ++diagonal)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        quarter_round(x[j], x[4 + (j + diagonal) % 4], x[8 + (j + 2 * diagonal) % 4], x[12 + (j + 3 * diagonal) % 4]);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] += start(i);
}

// Normals first .. first + count of the draw into z, by all lanes of a warp.
__device__ inline void warp_normals(const Noise& noise, int64_t first, int count, double* z) {
  const int lane = threadIdx.x % kWarp;
  const int64_t end = first + count;
  const auto put = [&](int64_t pair, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
    double even, odd;
    normal_pair(w0, w1, w2, w3, even, odd);
    const int64_t at = 2 * pair - first;
    if (at >= 0 && at < count) z[at] = even;
    if (at + 1 >= 0 && at + 1 < count) z[at + 1] = odd;
  };
  __syncwarp();  // z may hold what other lanes are still reading
  if (noise.mode == kChaCha20) {
    for (int64_t block = first / 8 + lane; 8 * block < end; block += kWarp) {
      uint32_t words[16];
      chacha20(noise, block, words);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        put(4 * block + i, words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  } else {
    for (int64_t pair = first / 2 + lane; 2 * pair < end; pair += kWarp) {
      uint32_t words[4];
      philox(noise, pair, words);
      put(pair, words[0], words[1], words[2], words[3]);
    }
  }
  __syncwarp();
}

}  // namespace adamix
