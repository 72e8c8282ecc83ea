// From the float64 sum of a row's squares to its squared norm and its factor, rounded to the safe side.
#pragma once

#include "common.cuh"

namespace adamix {

// Float of a sum of `terms` squares, never below the exact one; Inf for NaN and beyond float's range.
//
// Any order of n additions in double errs by less than n 2^-52 of the sum. Where squares were added in float
// (`narrow`), the first four operations of each can lose 5 2^-24 of it, and 2^-149 of each square that is denormal. The
// smallest normal float is far above what squares of float64 lose by underflow: rows whose squares vanish must not pass
// for zero.
__device__ inline float round_up_norm(double total, double terms, bool narrow) {
  const double slack = (terms + 1) * 0x1p-52 + (narrow ? 5 * 0x1p-24 : 0.0);
  const double upper = total * (1 + slack) + (narrow ? terms * 0x1p-149 : 0.0);
  if (!(upper <= static_cast<double>(FLT_MAX))) return as_float(0x7F800000u);
  return fmaxf(__double2float_ru(upper), FLT_MIN);
}

// min(1, threshold / norm) rounded down; 0 where the norm is not finite, or the factor not above the smallest normal
// number or not a number.
__device__ inline float clip_factor(double norm_sq, double threshold) {
  const double factor = threshold / sqrt(norm_sq);
  if (!(norm_sq <= DBL_MAX) || !(factor > 0)) return 0;
  const float rounded = __double2float_rd(fmin(factor, 1.0));
  return rounded < FLT_MIN ? 0 : rounded;
}

}  // namespace adamix
