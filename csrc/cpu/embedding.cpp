// Embeddings: gradients of one id are added up within a sample before they are squared or clipped.
//
// Positions are ordered by id, and the rows of an id added in that order, in double: the same bits for every thread
// count and instruction set.

#include "embedding.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>

#include "blocks.h"
#include "clip.h"
#include "isa.h"

namespace adamix {
namespace {

constexpr int64_t kColumns = 1024;  // of which two rows of accumulators stay in the first-level cache
constexpr int64_t kChunk = 64;      // positions of a sample whose norms are one thread's

// Where an id was looked up: a row of the gradients.
struct Place {
  int64_t id, row;
};
using Places = std::unique_ptr<Place[]>;

// Orders places by id, and those of one id as they stood: a byte of the ids at a time, of those that differ.
void sort_by_id(Place* places, Place* spare, int64_t count) {
  uint64_t differ = 0;
  for (int64_t i = 0; i < count; ++i) differ |= static_cast<uint64_t>(places[i].id ^ places[0].id);
  Place* from = places;
  for (int shift = 0; shift < 64; shift += 8) {
    if ((differ >> shift & 255) == 0) continue;
    const auto digit = [shift](const Place& place) { return static_cast<uint64_t>(place.id) >> shift & 255; };
    int64_t ends[256] = {};
    for (int64_t i = 0; i < count; ++i) ++ends[digit(from[i])];
    std::partial_sum(ends, ends + 256, ends);
    for (int64_t i = count; i-- > 0;) spare[--ends[digit(from[i])]] = from[i];
    std::swap(from, spare);
  }
  if (from != places) std::copy_n(from, count, spare);
}

// Past the last place of the run that begins at `first`.
int64_t end_of_run(const Place* places, int64_t first, int64_t count) {
  int64_t last = first + 1;
  while (last < count && places[last].id == places[first].id) ++last;
  return last;
}

// Asks for a row ahead of its turn: the order of ids is none that the hardware foresees.
void expect_read(const void* row, int64_t bytes) {
  constexpr int64_t kMost = 4096, kLine = 64;
  for (int64_t byte = 0; byte < std::min(bytes, kMost); byte += kLine)
    __builtin_prefetch(static_cast<const char*>(row) + byte);
}

// Rows to add to `total`, in the order they come: gathered, for the accumulators to be read and written less often.
class Queue {
 public:
  Queue(Add kernel, double* total, int64_t size) : kernel_(kernel), total_(total), size_(size) {}
  void push(const void* row, double coef) {
    rows_[count_] = row;
    coef_[count_++] = coef;
    if (count_ == kMost) flush();
  }
  void flush() {
    if (count_) kernel_(rows_, coef_, count_, total_, size_);
    count_ = 0;
  }

 private:
  static constexpr int kMost = 32;
  const Add kernel_;
  double* const total_;
  const int64_t size_;
  const void* rows_[kMost];
  double coef_[kMost];
  int count_ = 0;
};

// The squares of a sample's rows of the sum, and R, the magnitudes of all its rows of gradients.
struct Size {
  double squares = 0, length = 0;
};

// Of the runs that begin in a chunk of a sample's places.
Size sizes(const Lookups& lookups, const Place* places, int64_t count, int64_t chunk, double* total) {
  const Tensor& grads = lookups.grads;
  const SumSq square = sum_sq_of(grads.dtype);
  const auto at = [&](int64_t i) { return grads.at(places[i].row, 0); };
  const int64_t end = std::min(count, (chunk + 1) * kChunk);
  int64_t first = chunk * kChunk;
  while (0 < first && first < end && places[first].id == places[first - 1].id) ++first;
  Size size;
  for (int64_t last; first < end; first = last) {
    last = end_of_run(places, first, count);
    double squares = 0;  // of a run of one: of the others, below
    for (int64_t i = first; i < last; ++i) {
      if (i + 1 < count) expect_read(at(i + 1), grads.cols * size_of(grads.dtype));
      squares = square(at(i), grads.cols);
      size.length += std::sqrt(squares);
    }
    if (last > first + 1) {
      std::fill_n(total, grads.cols, 0.0);
      Queue queue(add_of(grads.dtype), total, grads.cols);
      for (int64_t i = first; i < last; ++i) queue.push(at(i), 1);
      queue.flush();
      squares = sum_sq_of(DType::kFloat64)(total, grads.cols);
    }
    size.squares += squares;
  }
  return size;
}

// A row of the sum, from the places of its id, which are ordered by sample. A sample's rows are added up before its
// factor: its terms may cancel.
void sum_row(const Lookups& lookups, const std::vector<double>& coef, const Place* places, int64_t count, int64_t start,
             int64_t size, double* total) {
  const auto at = [&](int64_t i) { return lookups.grads.at(places[i].row, start); };
  const auto sample = [&](int64_t i) { return places[i].row / lookups.positions; };
  const Add add = add_of(lookups.grads.dtype);
  std::fill_n(total, size, 0.0);
  Queue queue(add, total, size);
  for (int64_t first = 0, last; first < count; first = last) {
    const double factor = coef[sample(first)];
    for (last = first + 1; last < count && sample(last) == sample(first);) ++last;
    if (last == first + 1) {
      queue.push(at(first), factor);
      continue;
    }
    queue.flush();
    double own[kColumns];
    std::fill_n(own, size, 0.0);
    Queue terms(add, own, size);
    for (int64_t i = first; i < last; ++i) terms.push(at(i), 1);
    terms.flush();
    const void* rows = own;
    add_of(DType::kFloat64)(&rows, &factor, 1, total, size);
  }
  queue.flush();
}

// Asks for large pages: a table of fresh memory takes several times longer to enter page by page than to fill.
void expect_writes(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // it may refuse: no matter
#endif
}

template <class T>
void write(const double* total, int64_t n, void* out) {
  std::transform(total, total + n, static_cast<T*>(out), [](double x) { return static_cast<T>(x); });
}

}  // namespace

void embedding_norm_sq(const Lookups& lookups, float* out, int threads) {
  const int64_t samples = lookups.samples, positions = lookups.positions, cols = lookups.grads.cols;
  const int64_t chunks = (positions + kChunk - 1) / kChunk;
  const Places places(new Place[samples * positions]);
  std::vector<int64_t> counts(samples);
  std::vector<Size> partial(samples * chunks);
#pragma omp parallel num_threads(threads) if (samples * positions * cols > kSerial)
  {
    const Places spare(new Place[positions]);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < samples; ++b) {
      Place* own = places.get() + b * positions;
      for (int64_t row = b * positions; row < (b + 1) * positions; ++row)
        if (lookups.kept(row)) own[counts[b]++] = {lookups.ids[row], row};
      sort_by_id(own, spare.get(), counts[b]);
    }
    const std::unique_ptr<double[]> total(new double[cols]);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < samples * chunks; ++task) {
      const int64_t b = task / chunks;
      partial[task] = sizes(lookups, places.get() + b * positions, counts[b], task % chunks, total.get());
    }
  }
  // A gradient computed in double is off by (T + 2) 2^-52 R at most (`own_error` in adamix_kernels/ops/_factored.py):
  // that of the norm above, and that of the sum below, which must not let the sample's contribution grow.
  const double error = 2 * static_cast<double>(positions + 2) * std::numeric_limits<double>::epsilon();
  std::vector<double> squares(samples);
  for (int64_t b = 0; b < samples; ++b) {
    Size size;
    for (int64_t c = b * chunks; c < (b + 1) * chunks; ++c) {
      size.squares += partial[c].squares;
      size.length += partial[c].length;
    }
    const double above = std::sqrt(size.squares) + error * size.length;
    squares[b] = above * above;
  }
  round_up(squares, positions * cols + 16, out);
}

void embedding_clip_sum(const Lookups& lookups, const std::vector<double>& coef, int64_t ids, void* out, int threads) {
  const int64_t samples = lookups.samples, positions = lookups.positions, cols = lookups.grads.cols;
  const int64_t bytes = lookups.grads.dtype == DType::kFloat64 ? 8 : 4;
  const Places places(new Place[samples * positions]);
  int64_t count = 0;
  for (int64_t row = 0; row < samples * positions; ++row)
    if (coef[row / positions] > 0 && lookups.kept(row)) places[count++] = {lookups.ids[row], row};
  sort_by_id(places.get(), Places(new Place[count]).get(), count);

  const auto place_of = [&](int64_t id) {
    return std::partition_point(places.get(), places.get() + count, [&](const Place& p) { return p.id < id; }) -
           places.get();
  };
  expect_writes(out, ids * cols * bytes);
  // Threads share out rows of the sum, so that each writes, and reads, about as many; none of this changes a sum.
  const int64_t shares = 8 * threads, blocks = (cols + kColumns - 1) / kColumns;
  const auto boundary = [&](int64_t share) {
    int64_t low = 0, high = ids;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if ((middle + place_of(middle)) < (ids + count) * share / shares)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
#pragma omp parallel for num_threads(threads) schedule(dynamic) if ((ids + count) * cols > kSerial)
  for (int64_t task = 0; task < shares * blocks; ++task) {
    const int64_t start = task % blocks * kColumns, size = std::min(kColumns, cols - start);
    const int64_t end = boundary(task / blocks + 1);
    int64_t id = boundary(task / blocks), first = place_of(id);
    const auto at = [&](int64_t i) { return static_cast<char*>(out) + (i * cols + start) * bytes; };
    while (id < end) {
      const int64_t next = first < count ? std::min(places[first].id, end) : end;
      if (blocks == 1) std::memset(at(id), 0, (next - id) * cols * bytes), id = next;
      for (; id < next; ++id) std::memset(at(id), 0, size * bytes);
      if (id == end) break;
      const int64_t last = end_of_run(places.get(), first, count);
      double total[kColumns];
      sum_row(lookups, coef, places.get() + first, last - first, start, size, total);
      (bytes == 8 ? write<double> : write<float>)(total, size, at(id));
      first = last;
      ++id;
    }
  }
}

}  // namespace adamix
