// A barrier for threads that meet often and for short. OpenMP's puts waiting threads to sleep; where other processes
// compete for the cores, each then waits for its next turn, and dozens of meetings cost dozens of turns.
#pragma once

#include <atomic>
#include <thread>

namespace adamix {

class Barrier {
 public:
  // Returns when `count` threads have called it, any number of times in a row.
  void wait(int count) {
    const unsigned turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins)
      if (spins > kSpins) std::this_thread::yield();  // there may be more threads than cores
  }

 private:
  static constexpr int kSpins = 200;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> turn_{0};
};

}  // namespace adamix
