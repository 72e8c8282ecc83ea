// Element types of the inputs, and their values as double.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

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
// Masks instead of branches, so that it is vectorised without F16C, and right even where the processor flushes
// denormals: a denormal half is the smallest normal's exponent with its mantissa, less that normal.
ADAMIX_INLINE double widen(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t special = 0u - static_cast<uint32_t>(magnitude >= 0x7C00u << 13);  // Inf, NaN: keep the top exponent
  const uint32_t denormal = 0u - static_cast<uint32_t>(magnitude < 0x0400u << 13);
  const uint32_t rebias = (112u << 23) + (special & (112u << 23)) + (denormal & (1u << 23));
  const float value = as_float(magnitude + rebias) - as_float(denormal & (113u << 23));
  return sign ? -value : value;
}

// The same as float, for types no wider.
ADAMIX_INLINE float narrow(float x) { return x; }
template <class T>
ADAMIX_INLINE float narrow(T x) {
  return static_cast<float>(widen(x));
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Calls `body` with a null pointer of the element type.
template <class F>
auto dispatch(DType dtype, F body) {
  switch (dtype) {
    case DType::kFloat64: return body(static_cast<const double*>(nullptr));
    case DType::kFloat32: return body(static_cast<const float*>(nullptr));
    case DType::kBFloat16: return body(static_cast<const BFloat16*>(nullptr));
    case DType::kFloat16: return body(static_cast<const Float16*>(nullptr));
  }
  throw std::invalid_argument("dtype: this build has no kernel for it");
}

inline std::vector<double> widened(const void* data, DType dtype, int64_t n) {
  std::vector<double> values(n);
  dispatch(dtype, [&](auto* type) {
    const auto* x = static_cast<decltype(type)>(data);
    for (int64_t i = 0; i < n; ++i) values[i] = widen(x[i]);
  });
  return values;
}

}  // namespace adamix
