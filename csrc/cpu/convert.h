// Element types of the inputs, and their values as double.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "isa.h"

namespace adamix {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

ADAMIX_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ADAMIX_INLINE double widen(double x) { return x; }
ADAMIX_INLINE double widen(float x) { return x; }
ADAMIX_INLINE double widen(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
// Bit arithmetic that a compiler vectorises without F16C, and right even where the processor flushes denormals.
ADAMIX_INLINE double widen(Float16 x) {
  const int32_t magnitude = x.bits & 0x7FFF;
  const int32_t rebias = magnitude >= 0x7C00 ? 224 << 23 : 112 << 23;  // Inf and NaN keep the top exponent
  const double normal = as_float((magnitude << 13) + rebias);
  const double denormal = magnitude * 0x1p-24;
  const double value = magnitude < 0x0400 ? denormal : normal;
  return x.bits & 0x8000 ? -value : value;
}

// Calls `body` with a null pointer of the element type.
template <class F>
void dispatch(DType dtype, F body) {
  switch (dtype) {
    case DType::kFloat64: return body(static_cast<double*>(nullptr));
    case DType::kFloat32: return body(static_cast<float*>(nullptr));
    case DType::kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16: return body(static_cast<Float16*>(nullptr));
  }
  throw std::invalid_argument("dtype: this build has no kernel for it");
}

}  // namespace adamix
