// Per-sample gradients of a convolution, written out: for layers whose weight is small beside what goes through them.

#include <cmath>
#include <type_traits>

#include "blocks.h"
#include "conv.h"
#include "float_state.h"
#include "micro.h"
#include "panels.h"

namespace adamix {
namespace {

constexpr int64_t kRows = 256;  // positions in one chain of float32; longer sums are continued in float32

struct Workspace {
  std::vector<float> memory, tall, wide;
  std::vector<Box::Run> runs;
};

// Backprops [outputs, positions] of the rows, cut into panels of kTall outputs.
template <class T>
void pack(const T* g, int64_t outputs, int64_t positions, int64_t rows, std::vector<float>& panels) {
  panels.resize(round_to(outputs, kTall) * rows);
  for (int64_t o = 0; o < round_to(outputs, kTall); ++o) {
    float* out = panels.data() + o / kTall * kTall * rows + o % kTall;
    const T* x = g + o * positions;
    if (o < outputs)
      for (int64_t t = 0; t < rows; ++t) out[t * kTall] = narrow(x[t]);
    else
      for (int64_t t = 0; t < rows; ++t) out[t * kTall] = 0;
  }
}

// One group of one sample: `out` [outputs, window] and `bias` [outputs] of that group.
template <class A, class G>
void one(const A* a, const G* g, const ConvShape& s, float* out, float* bias, Workspace& work) {
  const auto product = outer();
  const int64_t outputs = s.outputs / s.groups, window = s.window(), positions = s.positions();
  float tile[kTall * kWide];
  std::fill_n(out, outputs * window, 0.0f);
  for (int64_t from = 0; from < positions; from += kRows) {
    const int64_t rows = std::min(kRows, positions - from);
    Box box(s, from, rows);
    box.fill(a, s.inputs / s.groups, work.memory);
    pack(g + from, outputs, positions, rows, work.tall);
    work.wide.resize(rows * kWide);
    for (int64_t column = 0; column < window; column += kWide) {
      const int64_t n = std::min<int64_t>(kWide, window - column);
      if (n < kWide) std::fill(work.wide.begin(), work.wide.end(), 0.0f);
      box.choose(column, n, work.runs);
      box.copy(from, rows, work.wide.data(), kWide);
      for (int64_t o = 0; o < outputs; o += kTall) {
        product(work.tall.data() + o * rows, work.wide.data(), rows, tile);
        for (int64_t r = 0; r < std::min<int64_t>(kTall, outputs - o); ++r) {
          float* row = out + (o + r) * window + column;
          for (int64_t i = 0; i < n; ++i) row[i] += tile[r * kWide + i];
        }
      }
    }
  }
  if (bias == nullptr) return;
  for (int64_t o = 0; o < outputs; ++o) {
    double sum = 0;
    for (int64_t t = 0; t < positions; ++t) sum += narrow(g[o * positions + t]);
    bias[o] = static_cast<float>(sum);
  }
}

}  // namespace

void conv_grad_sample(const void* activations, DType a_type, const void* backprops, DType g_type, int64_t samples,
                      const ConvShape& s, float* weight, float* bias, int threads) {
  const int64_t inputs = s.inputs / s.groups * s.size[0] * s.size[1] * s.size[2];
  const int64_t outputs = s.outputs / s.groups, count = samples * s.groups;
  const FloatState state = FloatState::current();
  dispatch(a_type, [&](auto* a) {
    dispatch(g_type, [&](auto* g) {
      using A = std::remove_const_t<std::remove_pointer_t<decltype(a)>>;
      using G = std::remove_const_t<std::remove_pointer_t<decltype(g)>>;
#pragma omp parallel num_threads(threads) if (count * s.positions() * outputs * s.window() > kSerial)
      {
        const FloatState::Hold hold(state);
        Workspace work;
#pragma omp for schedule(static)
        for (int64_t k = 0; k < count; ++k)
          one(static_cast<const A*>(activations) + k * inputs,
              static_cast<const G*>(backprops) + k * outputs * s.positions(), s, weight + k * outputs * s.window(),
              bias == nullptr ? nullptr : bias + k * outputs, work);
      }
    });
  });
}

}  // namespace adamix
