// Counter-based Gaussian noise: the values of the torch reference to rounding, whatever the threads and vectors.
//
// Loops run over arrays of independent counters, so that the compiler vectorises them for every instruction set.

#include "noise.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "../normal.h"
#include "isa.h"

namespace adamix {
namespace {

constexpr int kPairs = 64;  // pairs of normals made at a time, from 4 words each

struct Words {
  uint32_t at[4][kPairs];
};

// Vectors in the compiler's own notation: a state stays in registers, as it would not as an array, and each instruction
// set takes them in pieces of its own width.
using Wide = uint64_t __attribute__((vector_size(64)));  // 8 words, each in the low half of its lane
using Half = uint32_t __attribute__((vector_size(32)));
using Lanes = uint32_t __attribute__((vector_size(64)));

// Blocks first, first + 1, ... of Philox4x32-10 (Salmon et al. 2011).
ADAMIX_INLINE void philox(const uint32_t* key, uint64_t draw, uint64_t first, Words& words) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  constexpr int kLanes = 8;
  for (int i = 0; i < kPairs; i += kLanes) {
    const Wide block = Wide{0, 1, 2, 3, 4, 5, 6, 7} + (first + i);
    Wide c0 = block & kLow, c1 = block >> 32, c2 = Wide{} + (draw & kLow), c3 = Wide{} + (draw >> 32);
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const Wide p0 = c0 * 0xD2511F53u, p1 = c2 * 0xCD9E8D57u;
      c0 = (p1 >> 32) ^ c1 ^ k0;
      c1 = p1 & kLow;
      c2 = (p0 >> 32) ^ c3 ^ k1;
      c3 = p0 & kLow;
    }
    const Half out[4] = {__builtin_convertvector(c0, Half), __builtin_convertvector(c1, Half),
                         __builtin_convertvector(c2, Half), __builtin_convertvector(c3, Half)};
    for (int w = 0; w < 4; ++w) std::memcpy(words.at[w] + i, &out[w], sizeof out[w]);
  }
}

#ifdef ADAMIX_X86
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false, of the intrinsics' own undefined operands
// The same with the multiplication of low halves, which compilers do not find: twice as fast.
ADAMIX_AVX512 inline void philox_avx512(const uint32_t* key, uint64_t draw, uint64_t first, Words& words) {
  constexpr int kVectors = 4, kXor = 0x96;  // vectors at a time, to hide latencies; exclusive or of three
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53u), m1 = _mm512_set1_epi64(0xCD9E8D57u);
  const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (int i = 0; i < kPairs; i += 8 * kVectors) {
    __m512i c[4][kVectors];  // the counter's words in the low halves; the high ones are ignored
    for (int v = 0; v < kVectors; ++v) {
      c[0][v] = _mm512_add_epi64(lanes, _mm512_set1_epi64(first + i + 8 * v));
      c[1][v] = _mm512_srli_epi64(c[0][v], 32);
      c[2][v] = _mm512_set1_epi64(draw);
      c[3][v] = _mm512_set1_epi64(draw >> 32);
    }
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      for (int v = 0; v < kVectors; ++v) {
        const __m512i p0 = _mm512_mul_epu32(c[0][v], m0), p1 = _mm512_mul_epu32(c[2][v], m1);
        c[0][v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c[1][v], _mm512_set1_epi64(k0), kXor);
        c[1][v] = p1;
        c[2][v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c[3][v], _mm512_set1_epi64(k1), kXor);
        c[3][v] = p0;
      }
    for (int w = 0; w < 4; ++w)
      for (int v = 0; v < kVectors; ++v)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words.at[w] + i + 8 * v), _mm512_cvtepi64_epi32(c[w][v]));
  }
}
#pragma GCC diagnostic pop
#else
constexpr auto philox_avx512 = philox;
#endif

ADAMIX_INLINE void mix(Lanes& a, const Lanes& b, Lanes& d, int bits) {
  a += b;
  d ^= a;
  d = (d << bits) | (d >> (32 - bits));
}

ADAMIX_INLINE void quarter_round(Lanes& a, Lanes& b, Lanes& c, Lanes& d) {
  mix(a, b, d, 16);
  mix(c, d, b, 12);
  mix(a, b, d, 8);
  mix(c, d, b, 7);
}

// The words of pairs first, first + 1, ... (a multiple of 4) from ChaCha20 blocks (RFC 8439): 16 blocks of 4 pairs.
ADAMIX_INLINE void chacha20(const uint32_t* key, uint64_t draw, uint64_t first, Words& words) {
  constexpr uint32_t kConstants[4] = {0x61707865u, 0x3320646Eu, 0x79622D32u, 0x6B206574u};
  constexpr int kBlocks = kPairs / 4;
  Lanes start[16], low, high;
  for (int i = 0; i < kBlocks; ++i) {
    low[i] = static_cast<uint32_t>(first / 4 + i);
    high[i] = static_cast<uint32_t>((first / 4 + i) >> 32);
  }
  for (int w = 0; w < 4; ++w) start[w] = Lanes{} + kConstants[w];
  for (int w = 0; w < 8; ++w) start[4 + w] = Lanes{} + key[w];
  start[12] = low;
  start[13] = high;
  start[14] = Lanes{} + static_cast<uint32_t>(draw);
  start[15] = Lanes{} + static_cast<uint32_t>(draw >> 32);
  Lanes x0 = start[0], x1 = start[1], x2 = start[2], x3 = start[3], x4 = start[4], x5 = start[5], x6 = start[6],
        x7 = start[7], x8 = start[8], x9 = start[9], x10 = start[10], x11 = start[11], x12 = start[12], x13 = start[13],
        x14 = start[14], x15 = start[15];
  for (int round = 0; round < 10; ++round) {
    quarter_round(x0, x4, x8, x12);
    quarter_round(x1, x5, x9, x13);
    quarter_round(x2, x6, x10, x14);
    quarter_round(x3, x7, x11, x15);
    quarter_round(x0, x5, x10, x15);
    quarter_round(x1, x6, x11, x12);
    quarter_round(x2, x7, x8, x13);
    quarter_round(x3, x4, x9, x14);
  }
  const Lanes x[16] = {x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15};
  for (int w = 0; w < 4; ++w) {
    const Lanes a = x[w] + start[w], b = x[4 + w] + start[4 + w], c = x[8 + w] + start[8 + w],
                d = x[12 + w] + start[12 + w];
    for (int i = 0; i < kBlocks; ++i) {
      words.at[w][4 * i] = a[i];
      words.at[w][4 * i + 1] = b[i];
      words.at[w][4 * i + 2] = c[i];
      words.at[w][4 * i + 3] = d[i];
    }
  }
}

ADAMIX_INLINE void normals(const Words& words, double* z) {
  for (int i = 0; i < kPairs; ++i)
    normal_pair(words.at[0][i], words.at[1][i], words.at[2][i], words.at[3][i], z[2 * i], z[2 * i + 1]);
}

constexpr uint64_t kGroup = 2 * kPairs;

// Normals kGroup index .. kGroup (index + 1).
template <auto kPhilox>
ADAMIX_INLINE void group(const Noise& noise, uint64_t index, double* z) {
  Words words;
  if (noise.secure())
    chacha20(noise.key.data(), noise.draw, index * kPairs, words);
  else
    kPhilox(noise.key.data(), noise.draw, index * kPairs, words);
  normals(words, z);
}

void group_portable(const Noise& noise, uint64_t index, double* z) { group<philox>(noise, index, z); }
ADAMIX_AVX2 void group_avx2(const Noise& noise, uint64_t index, double* z) { group<philox>(noise, index, z); }
ADAMIX_AVX512 void group_avx512(const Noise& noise, uint64_t index, double* z) {
  group<philox_avx512>(noise, index, z);
}

template <class T>
ADAMIX_INLINE void add_scaled(T* data, double std, const double* z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) data[i] = static_cast<T>(data[i] + std * z[i]);
}
template <class T>
void add_portable(T* data, double std, const double* z, int64_t n) {
  add_scaled(data, std, z, n);
}
template <class T>
ADAMIX_AVX2 void add_avx2(T* data, double std, const double* z, int64_t n) {
  add_scaled(data, std, z, n);
}
template <class T>
ADAMIX_AVX512 void add_avx512(T* data, double std, const double* z, int64_t n) {
  add_scaled(data, std, z, n);
}

template <class T>
void add(T* data, int64_t n, const Noise& noise, uint64_t offset, int threads) {
  constexpr int64_t kPiece = 1024;  // whose normals stay in the first-level cache
  const auto kernel = pick(add_portable<T>, add_avx2<T>, add_avx512<T>);
  const int64_t pieces = (n + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 4096)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t start = piece * kPiece, size = std::min(kPiece, n - start);
    double z[kPiece];
    noise.normals(offset + start, size, z);
    kernel(data + start, noise.std, z, size);
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
