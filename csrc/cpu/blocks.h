// A list of tensors cut into blocks of columns, and the blocks shared out to threads.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

namespace adamix {

// Columns of the largest block. Its accumulators, 128 KiB, lie in the second-level cache; rows are read in runs long
// enough for the hardware's prefetching.
constexpr int64_t kBlock = 16384;

// Elements below which waking the other threads costs more than they do.
constexpr int64_t kSerial = 1 << 15;

struct Block {
  int64_t part, start, size;
};

template <class Parts>
int64_t total_cols(const Parts& parts) {
  int64_t cols = 0;
  for (const auto& part : parts) cols += part.cols;
  return cols;
}

// Sums over blocks are taken in their order, so their size follows from the list alone, not from the threads: small
// lists are cut small enough to be shared out.
template <class Parts>
std::vector<Block> cut(const Parts& parts) {
  int64_t most = 512;
  while (most < kBlock && most * 32 < total_cols(parts)) most *= 2;
  std::vector<Block> blocks;
  for (size_t part = 0; part < parts.size(); ++part)
    for (int64_t start = 0; start < parts[part].cols; start += most)
      blocks.push_back({static_cast<int64_t>(part), start, std::min(most, parts[part].cols - start)});
  return blocks;
}

// A thread of a parallel region.
struct Thread {
#ifdef _OPENMP
  int index = omp_get_thread_num(), count = omp_get_num_threads();
#else
  int index = 0, count = 1;
#endif
};

// The blocks first .. last that a thread takes: about equal numbers of columns.
inline void share(const std::vector<Block>& blocks, Thread thread, int64_t& first, int64_t& last) {
  int64_t cols = 0;
  for (const Block& block : blocks) cols += block.size;
  const int64_t from = cols * thread.index / thread.count, to = cols * (thread.index + 1) / thread.count;
  first = last = 0;
  int64_t before = 0;
  for (const Block& block : blocks) {
    first += before < from;
    last += before < to;
    before += block.size;
  }
}

}  // namespace adamix
