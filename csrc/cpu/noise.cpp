// Counter-based Gaussian noise: the values of the torch reference to rounding, whatever the threads and vectors.
//
// Loops run over arrays of independent counters, so that the compiler vectorises them for every instruction set.

#include "noise.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

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

// 53 random bits of two words, as a whole number.
ADAMIX_INLINE double bits53(uint32_t high, uint32_t low) {
  return static_cast<int32_t>(high >> 5) * 67108864.0 + static_cast<int32_t>(low >> 6);
}

// Natural logarithm of a normal number in (0, 1], after fdlibm's __ieee754_log: within one unit in the last place.
ADAMIX_INLINE double log_fraction(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // The exponent for which the rest lies in [sqrt(1/2), sqrt(2)).
  const uint64_t shifted = bits + (0x3FF0000000000000u - 0x3FE6A09E667F3BCDu);
  const int32_t exponent = static_cast<int32_t>(shifted >> 52) - 1023;
  bits -= static_cast<uint64_t>(static_cast<int64_t>(exponent)) << 52;
  double rest;
  std::memcpy(&rest, &bits, sizeof rest);
  const double f = rest - 1, s = f / (2 + f), z = s * s, half = 0.5 * f * f, e = exponent;
  double r = 1.479819860511658591e-01;
  r = r * z + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
  return e * 6.93147180369123816490e-01 - ((half - (s * (half + r * z) + e * 1.90821492927058770002e-10)) - f);
}

// Two independent normals by Box-Muller.
ADAMIX_INLINE void normals(const Words& words, double* z) {
  for (int i = 0; i < kPairs; ++i) {
    const double u = (bits53(words.at[0][i], words.at[1][i]) + 1) * 0x1p-53;
    const double radius = std::sqrt(-2 * log_fraction(u));
    const double turns = bits53(words.at[2][i], words.at[3][i]) * 0x1p-51;  // quarter turns, in [0, 4)
    const int32_t quarter = static_cast<int32_t>(turns + 0.5);
    const double a = (turns - quarter) * 1.57079632679489661923;  // in [-pi/4, pi/4]
    const double s = a * a;
    double sine = 1.58969099521155010221e-10, cosine = -1.13596475577881948265e-11;  // fdlibm's __kernel_sin, _cos
    sine = sine * s - 2.50507602534068634195e-08;
    sine = sine * s + 2.75573137070700676789e-06;
    sine = sine * s - 1.98412698298579493134e-04;
    sine = sine * s + 8.33333333332248946124e-03;
    sine = sine * s - 1.66666666666666324348e-01;
    sine = a + a * s * sine;
    cosine = cosine * s + 2.08757232129817482790e-09;
    cosine = cosine * s - 2.75573143513906633035e-07;
    cosine = cosine * s + 2.48015872894767294178e-05;
    cosine = cosine * s - 1.38888888888741095749e-03;
    cosine = cosine * s + 4.16666666666666019037e-02;
    cosine = 1 - 0.5 * s + s * s * cosine;
    const double x = quarter & 1 ? sine : cosine, y = quarter & 1 ? cosine : sine;
    z[2 * i] = radius * ((quarter + 1) & 2 ? -x : x);
    z[2 * i + 1] = radius * (quarter & 2 ? -y : y);
  }
}

struct Stream {
  const uint32_t* key;
  uint64_t draw;
  bool secure;
};

ADAMIX_INLINE void group(const Stream& stream, uint64_t index, double* z) {
  Words words;
  if (stream.secure)
    chacha20(stream.key, stream.draw, index * kPairs, words);
  else
    philox(stream.key, stream.draw, index * kPairs, words);
  normals(words, z);
}

void group_portable(const Stream& stream, uint64_t index, double* z) { group(stream, index, z); }
ADAMIX_AVX2 void group_avx2(const Stream& stream, uint64_t index, double* z) { group(stream, index, z); }
ADAMIX_AVX512 void group_avx512(const Stream& stream, uint64_t index, double* z) { group(stream, index, z); }

template <class T>
void add(T* data, int64_t n, double std, const Stream& stream, uint64_t offset, int threads) {
  constexpr uint64_t kSize = 2 * kPairs;
  const auto kernel = pick(group_portable, group_avx2, group_avx512);
  const uint64_t end = offset + n;
  const int64_t first = offset / kSize, last = (end + kSize - 1) / kSize;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 4096)
  for (int64_t index = first; index < last; ++index) {
    double z[kSize];
    kernel(stream, index, z);
    const uint64_t start = index * kSize, from = std::max(start, offset), to = std::min(start + kSize, end);
    for (uint64_t e = from; e < to; ++e) data[e - offset] = static_cast<T>(data[e - offset] + std * z[e - start]);
  }
}

}  // namespace

void add_gaussian_noise(void* data, DType dtype, int64_t n, double std, const std::vector<uint32_t>& key, uint64_t draw,
                        uint64_t offset, int threads) {
  if (key.size() != 2 && key.size() != 8) throw std::invalid_argument("key: expected 2 words or 8");
  const Stream stream{key.data(), draw, key.size() == 8};
  if (n == 0) return;
  if (dtype == DType::kFloat64)
    add(static_cast<double*>(data), n, std, stream, offset, threads);
  else if (dtype == DType::kFloat32)
    add(static_cast<float*>(data), n, std, stream, offset, threads);
  else
    throw std::invalid_argument("dtype: expected float32 or float64");
}

}  // namespace adamix
