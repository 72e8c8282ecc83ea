// How a thread treats denormal numbers, made the same in all that share a task.
//
// `torch.set_flush_denormal` sets it for the calling thread alone. A norm that one thread made, flushing, and a sum
// that another adds up, keeping, would be of different numbers: a denormal times a large one is an ordinary number.
#pragma once

#include "isa.h"

#ifdef ADAMIX_X86
#include <immintrin.h>
#endif

namespace adamix {

class FloatState {
 public:
  // That of the calling thread.
  static FloatState current() { return FloatState(read()); }

  // Holds a thread to it for as long as this lives.
  class Hold {
   public:
    explicit Hold(FloatState state) : before_(read()) { write(state.bits_); }
    ~Hold() { write(before_); }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

   private:
    unsigned before_;
  };

 private:
  explicit FloatState(unsigned bits) : bits_(bits) {}
#ifdef ADAMIX_X86
  static unsigned read() { return _mm_getcsr(); }
  static void write(unsigned bits) { _mm_setcsr(bits); }
#else
  static unsigned read() { return 0; }
  static void write(unsigned) {}
#endif

  unsigned bits_;
};

}  // namespace adamix
