// Per-sample gradients of a convolution, one sample after the other: written out, their norms, or their weighted sum.
// For weights that are small beside what goes through them.

#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "blocks.h"
#include "conv.h"
#include "float_state.h"
#include "isa.h"
#include "micro.h"
#include "panels.h"

namespace adamix {
namespace {

struct Workspace {
  std::vector<float> memory, tall, wide, weight, bias;
  std::vector<Box::Columns> columns;  // of each chunk of positions and each panel: the same for all samples
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
  const int64_t panels = (window + kWide - 1) / kWide;
  float tile[kTall * kWide];
  work.columns.resize((positions + kDepth - 1) / kDepth * panels);
  if (positions == 0) std::fill_n(out, outputs * window, 0.0f);
  for (int64_t from = 0; from < positions; from += kDepth) {
    const int64_t rows = std::min(kDepth, positions - from);
    Box box(s, from, rows);
    box.fill(a, s.inputs / s.groups, work.memory);
    pack(g + from, outputs, positions, rows, work.tall);
    work.wide.resize(rows * kWide);
    for (int64_t column = 0; column < window; column += kWide) {
      const int64_t n = std::min<int64_t>(kWide, window - column);
      if (n < kWide) std::fill(work.wide.begin(), work.wide.end(), 0.0f);
      Box::Columns& columns = work.columns[from / kDepth * panels + column / kWide];
      if (columns.runs.empty()) box.choose(column, n, columns);
      box.copy(columns, from, rows, work.wide.data(), kWide);
      for (int64_t o = 0; o < outputs; o += kTall) {
        product(work.tall.data() + o * rows, work.wide.data(), rows, tile);
        for (int64_t r = 0; r < std::min<int64_t>(kTall, outputs - o); ++r) {
          float* row = out + (o + r) * window + column;
          if (from == 0)
            std::memcpy(row, tile + r * kWide, n * sizeof(float));
          else
            for (int64_t i = 0; i < n; ++i) row[i] += tile[r * kWide + i];
        }
      }
    }
  }
  if (bias == nullptr) return;
  constexpr int kParts = 8;
  for (int64_t o = 0; o < outputs; ++o) {
    const G* x = g + o * positions;
    double sums[kParts] = {};
    int64_t t = 0;
    for (; t + kParts <= positions; t += kParts)
      for (int p = 0; p < kParts; ++p) sums[p] += narrow(x[t + p]);
    for (int p = 0; t < positions; ++t, ++p) sums[p] += narrow(x[t]);
    bias[o] = static_cast<float>(std::accumulate(sums, sums + kParts, 0.0));
  }
}

ADAMIX_INLINE void add_times(double* total, double factor, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += factor * x[i];
}
void add_portable(double* total, double factor, const float* x, int64_t n) { add_times(total, factor, x, n); }
ADAMIX_AVX2 void add_avx2(double* total, double factor, const float* x, int64_t n) { add_times(total, factor, x, n); }
ADAMIX_AVX512 void add_avx512(double* total, double factor, const float* x, int64_t n) {
  add_times(total, factor, x, n);
}

// A layer's factors, of any types, cut into groups of samples.
struct Layer {
  const void *activations, *backprops;
  DType a_type, g_type;
  const ConvShape& s;

  int64_t inputs() const { return s.inputs / s.groups * s.size[0] * s.size[1] * s.size[2]; }
  int64_t outputs() const { return s.outputs / s.groups; }
  int64_t weights() const { return outputs() * s.window(); }

  // Writes the gradient of group k (of sample k / groups).
  void gradient(int64_t k, float* weight, float* bias, Workspace& work) const {
    dispatch(a_type, [&](auto* a) {
      dispatch(g_type, [&](auto* g) {
        using A = std::remove_const_t<std::remove_pointer_t<decltype(a)>>;
        using G = std::remove_const_t<std::remove_pointer_t<decltype(g)>>;
        one(static_cast<const A*>(activations) + k * inputs(),
            static_cast<const G*>(backprops) + k * outputs() * s.positions(), s, weight, bias, work);
      });
    });
  }
};

}  // namespace

bool by_samples(const ConvShape& s) {
  constexpr int64_t kLeast = 256, kMost = 1 << 15;  // below, tiles are waste; above, gradients leave the caches
  const int64_t weights = s.outputs / s.groups * s.window();
  return weights >= kLeast && weights * s.groups <= kMost;
}

void conv_grad_sample(const void* activations, DType a_type, const void* backprops, DType g_type, int64_t samples,
                      const ConvShape& s, float* weight, float* bias, int threads) {
  const Layer layer{activations, backprops, a_type, g_type, s};
  const int64_t count = samples * s.groups;
  const FloatState state = FloatState::current();
#pragma omp parallel num_threads(threads) if (count * s.positions() * layer.weights() > kSerial)
  {
    const FloatState::Hold hold(state);
    Workspace work;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < count; ++k)
      layer.gradient(k, weight + k * layer.weights(), bias == nullptr ? nullptr : bias + k * layer.outputs(), work);
  }
}

std::vector<double> conv_norm_sq_by_samples(const void* activations, DType a_type, const void* backprops, DType g_type,
                                            int64_t samples, const ConvShape& s, bool bias, int threads) {
  const Layer layer{activations, backprops, a_type, g_type, s};
  const int64_t count = samples * s.groups, positions = s.positions(), outputs = layer.outputs();
  const auto a_square = sum_sq_of(a_type), g_square = sum_sq_of(g_type), square = sum_sq_of(DType::kFloat32);
  // How many windows see one input at most.
  double seen = 1;
  for (int axis = 0; axis < 3; ++axis)
    seen *= std::min<int64_t>(s.out[axis], (s.dilation[axis] * (s.kernel[axis] - 1)) / s.stride[axis] + 1);
  const double chains = std::min(positions, kDepth) + positions / kDepth + 3;
  const double room = (std::min<double>(positions, 64) + 16 + positions / 128.0) * 0x1p-23;  // see `sum_error`
  std::vector<double> parts(count), norms(samples);
  const FloatState state = FloatState::current();
#pragma omp parallel num_threads(threads) if (count * positions * layer.weights() > kSerial)
  {
    const FloatState::Hold hold(state);
    Workspace work;
    work.weight.resize(layer.weights());
    work.bias.resize(outputs);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < count; ++k) {
      layer.gradient(k, work.weight.data(), bias ? work.bias.data() : nullptr, work);
      const int64_t a_size = size_of(a_type) * layer.inputs(), g_size = size_of(g_type) * outputs * positions;
      const double a = a_square(static_cast<const char*>(activations) + k * a_size, layer.inputs());
      const double g = g_square(static_cast<const char*>(backprops) + k * g_size, outputs * positions);
      // R, the sum of |a_t| |g_t|, is at most this: Cauchy-Schwarz, each input counted as often as it may be seen.
      const double r = std::sqrt((a * seen + (bias ? positions : 0)) * g) * (1 + 0x1p-30);
      double norm = square(work.weight.data(), layer.weights());
      if (bias) norm += square(work.bias.data(), outputs);
      // What the float32 chains may have lost, and what underflowed.
      const double lost = chains * 0x1p-24 * r + (r > 0 ? positions * std::sqrt(layer.weights()) * 0x1p-126 : 0);
      const double whole = std::sqrt(norm) * (1 + 0x1p-30) + lost + room * r;
      parts[k] = whole * whole;
    }
  }
  for (int64_t k = 0; k < count; ++k) norms[k / s.groups] += parts[k];
  return norms;
}

void conv_clip_sum_by_samples(const void* activations, DType a_type, const void* backprops, DType g_type,
                              const std::vector<double>& coef, const ConvShape& s, float* weight, float* bias,
                              int threads) {
  const Layer layer{activations, backprops, a_type, g_type, s};
  const int64_t samples = coef.size(), size = layer.weights() * s.groups;
  const int64_t parts = std::clamp<int64_t>(samples / 8, 1, 8);  // in a number that does not depend on the threads
  const auto add = pick(add_portable, add_avx2, add_avx512);
  std::vector<std::vector<double>> totals(parts);
  const FloatState state = FloatState::current();
#pragma omp parallel num_threads(threads) if (samples * s.positions() * size > kSerial)
  {
    const FloatState::Hold hold(state);
    Workspace work;
    work.weight.resize(layer.weights());
    work.bias.resize(layer.outputs());
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      std::vector<double>& total = totals[part];
      total.assign(size + (bias == nullptr ? 0 : s.outputs), 0.0);
      for (int64_t b = samples * part / parts; b < samples * (part + 1) / parts; ++b)
        for (int64_t group = 0; group < s.groups && coef[b] > 0; ++group) {
          layer.gradient(b * s.groups + group, work.weight.data(), bias == nullptr ? nullptr : work.bias.data(), work);
          add(total.data() + group * layer.weights(), coef[b], work.weight.data(), layer.weights());
          if (bias != nullptr)
            add(total.data() + size + group * layer.outputs(), coef[b], work.bias.data(), layer.outputs());
        }
    }
  }
  std::vector<double>& sum = totals[0];
  for (int64_t part = 1; part < parts; ++part)
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += totals[part][i];
  for (int64_t i = 0; i < size; ++i) weight[i] = static_cast<float>(sum[i]);
  for (int64_t i = size; i < static_cast<int64_t>(sum.size()); ++i) bias[i - size] = static_cast<float>(sum[i]);
}

}  // namespace adamix
