// Asynchronous copies to shared memory that arrive as late as they may.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  const auto misaligned = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % size;
  if ((size != 4 && size != 8 && size != 16) || misaligned) emulator::fail("a misaligned asynchronous copy");
  emulator::Fiber& fiber = *emulator::block().current;
  std::memset(to, 0xFF, size);
  fiber.copies.push_back({to, from, size, fiber.groups});
}
inline void __pipeline_commit() { ++emulator::block().current->groups; }
inline void __pipeline_wait_prior(size_t prior) {
  emulator::Fiber& fiber = *emulator::block().current;
  std::erase_if(fiber.copies, [&](const emulator::Copy& copy) {
    if (copy.group + static_cast<int>(prior) >= fiber.groups) return false;
    std::memcpy(copy.to, copy.from, copy.size);
    return true;
  });
}
