// What the tests ask of the emulated device.
#include "cuda_runtime.h"

extern "C" void emulator_configure(int multiprocessors, int shared, int threads, int cooperative, unsigned seed) {
  emulator::device = {multiprocessors, shared, threads, cooperative, seed};
}
extern "C" long long emulator_launches() { return emulator::device.launches; }
extern "C" long long emulator_cooperative_launches() { return emulator::device.cooperative_launches; }
