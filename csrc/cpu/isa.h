// Choosing between versions of one kernel compiled for several instruction sets, at run time.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define ADAMIX_X86 1
#define ADAMIX_AVX2 __attribute__((target("avx2,fma,f16c")))
#define ADAMIX_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")))
#else
#define ADAMIX_AVX2
#define ADAMIX_AVX512
#endif
// Inlined into a function with a `target`, a body is compiled for that target.
#define ADAMIX_INLINE inline __attribute__((always_inline))

namespace adamix {

enum class Isa { kPortable, kAvx2, kAvx512 };

inline Isa best_isa() {
#ifdef ADAMIX_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

// What `pick` picks for; tests lower it to reach every version.
inline Isa& current_isa() {
  static Isa isa = best_isa();
  return isa;
}

template <class F>
F pick(F portable, F avx2, F avx512) {
  switch (current_isa()) {
    case Isa::kAvx512: return avx512;
    case Isa::kAvx2: return avx2;
    default: return portable;
  }
}

}  // namespace adamix
