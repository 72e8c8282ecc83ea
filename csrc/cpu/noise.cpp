// Counter-based Gaussian noise: the values of the torch reference to rounding, whatever the threads and vectors.
//
// Loops run over arrays of independent counters, so that the compiler vectorises them for every instruction set.

#include "noise.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../normal.h"
#include "blocks.h"
#include "isa.h"

namespace adamix {
namespace {

constexpr int kPairs = 64;           // pairs of normals made at a time, from 4 words each
constexpr int kBlocks = kPairs / 4;  // ChaCha20 blocks of 16 words for them

struct Words {
  uint32_t at[4][kPairs];
};

// Blocks first, first + 1, ... of Philox4x32-10 (Salmon et al. 2011).
ADAMIX_INLINE void philox(const uint32_t* key, uint64_t draw, uint64_t first, Words& words) {
  auto& c = words.at;
  for (int i = 0; i < kPairs; ++i) {
    c[0][i] = static_cast<uint32_t>(first + i);
    c[1][i] = static_cast<uint32_t>((first + i) >> 32);
    c[2][i] = static_cast<uint32_t>(draw);
    c[3][i] = static_cast<uint32_t>(draw >> 32);
  }
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int i = 0; i < kPairs; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c[0][i], p1 = uint64_t{0xCD9E8D57u} * c[2][i];
      c[0][i] = static_cast<uint32_t>(p1 >> 32) ^ c[1][i] ^ k0;
      c[1][i] = static_cast<uint32_t>(p1);
      c[2][i] = static_cast<uint32_t>(p0 >> 32) ^ c[3][i] ^ k1;
      c[3][i] = static_cast<uint32_t>(p0);
    }
}

using Lanes = uint32_t[kBlocks];

ADAMIX_INLINE void mix(Lanes& a, const Lanes& b, Lanes& d, int bits) {
  for (int i = 0; i < kBlocks; ++i) {
    a[i] += b[i];
    const uint32_t x = d[i] ^ a[i];
    d[i] = (x << bits) | (x >> (32 - bits));
  }
}

ADAMIX_INLINE void quarter_round(Lanes& a, Lanes& b, Lanes& c, Lanes& d) {
  mix(a, b, d, 16);
  mix(c, d, b, 12);
  mix(a, b, d, 8);
  mix(c, d, b, 7);
}

// The words of pairs first, first + 1, ... (a multiple of 4) from ChaCha20 blocks (RFC 8439).
ADAMIX_INLINE void chacha20(const uint32_t* key, uint64_t draw, uint64_t first, Words& words) {
  constexpr uint32_t kConstants[4] = {0x61707865u, 0x3320646Eu, 0x79622D32u, 0x6B206574u};
  Lanes start[16], x[16];
  for (int i = 0; i < kBlocks; ++i) {
    for (int w = 0; w < 4; ++w) start[w][i] = kConstants[w];
    for (int w = 0; w < 8; ++w) start[4 + w][i] = key[w];
    start[12][i] = static_cast<uint32_t>(first / 4 + i);
    start[13][i] = static_cast<uint32_t>((first / 4 + i) >> 32);
    start[14][i] = static_cast<uint32_t>(draw);
    start[15][i] = static_cast<uint32_t>(draw >> 32);
  }
  std::memcpy(x, start, sizeof x);
  for (int round = 0; round < 10; ++round)
    for (int diagonal = 0; diagonal < 2; ++diagonal)
      for (int j = 0; j < 4; ++j)
        quarter_round(x[j], x[4 + (j + diagonal) % 4], x[8 + (j + 2 * diagonal) % 4], x[12 + (j + 3 * diagonal) % 4]);
  for (int w = 0; w < 16; ++w)
    for (int i = 0; i < kBlocks; ++i) words.at[w % 4][4 * i + w / 4] = x[w][i] + start[w][i];
}

ADAMIX_INLINE void normals(const Words& words, double* z) {
  for (int i = 0; i < kPairs; ++i)
    normal_pair(words.at[0][i], words.at[1][i], words.at[2][i], words.at[3][i], z[2 * i], z[2 * i + 1]);
}

constexpr uint64_t kGroup = 2 * kPairs;

// Normals kGroup index .. kGroup (index + 1).
ADAMIX_INLINE void group(const Noise& noise, uint64_t index, double* z) {
  Words words;
  if (noise.key.size() == 8)
    chacha20(noise.key.data(), noise.draw, index * kPairs, words);
  else
    philox(noise.key.data(), noise.draw, index * kPairs, words);
  normals(words, z);
}

void group_portable(const Noise& noise, uint64_t index, double* z) { group(noise, index, z); }
ADAMIX_AVX2 void group_avx2(const Noise& noise, uint64_t index, double* z) { group(noise, index, z); }
ADAMIX_AVX512 void group_avx512(const Noise& noise, uint64_t index, double* z) { group(noise, index, z); }

template <class T>
void add(T* data, int64_t n, const Noise& noise, uint64_t offset, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 4096)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * kBlock, size = std::min(kBlock, n - start);
    double z[kBlock];
    noise.normals(offset + start, size, z);
    for (int64_t i = 0; i < size; ++i) data[start + i] = static_cast<T>(data[start + i] + noise.std * z[i]);
  }
}

}  // namespace

void Noise::check() const {
  if (key.size() != 2 && key.size() != 8) throw std::invalid_argument("key: expected 2 words or 8");
}

void Noise::normals(uint64_t first, int64_t n, double* z) const {
  const auto kernel = pick(group_portable, group_avx2, group_avx512);
  const uint64_t end = first + n;
  for (uint64_t index = first / kGroup; index * kGroup < end; ++index) {
    const uint64_t start = index * kGroup;
    if (first <= start && start + kGroup <= end) {
      kernel(*this, index, z + (start - first));
      continue;
    }
    double whole[kGroup];
    kernel(*this, index, whole);
    const uint64_t from = std::max(start, first), to = std::min(start + kGroup, end);
    std::copy(whole + (from - start), whole + (to - start), z + (from - first));
  }
}

void add_gaussian_noise(void* data, DType dtype, int64_t n, const Noise& noise, uint64_t offset, int threads) {
  noise.check();
  if (dtype == DType::kFloat64)
    add(static_cast<double*>(data), n, noise, offset, threads);
  else if (dtype == DType::kFloat32)
    add(static_cast<float*>(data), n, noise, offset, threads);
  else
    throw std::invalid_argument("dtype: expected float32 or float64");
}

}  // namespace adamix
