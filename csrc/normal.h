// Normals from random words, the same arithmetic on the CPU and on a GPU: no operation but the IEEE ones, no branch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ADAMIX_SHARED_INLINE __host__ __device__ __forceinline__
#else
#define ADAMIX_SHARED_INLINE inline __attribute__((always_inline))
#endif

namespace adamix {

// 53 random bits of two words, as a whole number.
ADAMIX_SHARED_INLINE double bits53(uint32_t high, uint32_t low) {
  return static_cast<int32_t>(high >> 5) * 67108864.0 + static_cast<int32_t>(low >> 6);
}

// Natural logarithm of a normal number in (0, 1], after fdlibm's __ieee754_log: within one unit in the last place.
ADAMIX_SHARED_INLINE double log_fraction(double x) {
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

// Two independent normals from four random words, by Box-Muller.
ADAMIX_SHARED_INLINE void normal_pair(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, double& even, double& odd) {
  const double u = (bits53(w0, w1) + 1) * 0x1p-53;
  const double radius = std::sqrt(-2 * log_fraction(u));
  const double turns = bits53(w2, w3) * 0x1p-51;  // quarter turns, in [0, 4)
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
  even = radius * ((quarter + 1) & 2 ? -x : x);
  odd = radius * (quarter & 2 ? -y : y);
}

}  // namespace adamix
