// Per-sample gradients of a convolution, one sample after the other: written out, their norms, or their weighted sum.
// For weights that are small beside what goes through them.

#include <cmath>
#include <cstring>
#include <type_traits>

#include "blocks.h"
#include "conv.h"
#include "float_state.h"
#include "isa.h"
#include "micro.h"
#include "panels.h"

namespace adamix {
namespace {

template <class T>
ADAMIX_INLINE void add_times(T* total, T factor, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += factor * x[i];
}
template <class T>
void add_portable(T* total, T factor, const float* x, int64_t n) {
  add_times(total, factor, x, n);
}
template <class T>
ADAMIX_AVX2 void add_avx2(T* total, T factor, const float* x, int64_t n) {
  add_times(total, factor, x, n);
}
template <class T>
ADAMIX_AVX512 void add_avx512(T* total, T factor, const float* x, int64_t n) {
  add_times(total, factor, x, n);
}

// Sums over positions of backprops [outputs, positions].
template <class T>
ADAMIX_INLINE void sums(const T* g, int64_t outputs, int64_t positions, float* out) {
  constexpr int kParts = 16;
  for (int64_t o = 0; o < outputs; ++o, g += positions) {
    double parts[kParts] = {};
    int64_t t = 0;
    for (; t + kParts <= positions; t += kParts)
      for (int p = 0; p < kParts; ++p) parts[p] += widen(g[t + p]);
    for (int p = 0; t < positions; ++t, ++p) parts[p] += widen(g[t]);
    double all = 0;
    for (int p = 0; p < kParts; ++p) all += parts[p];
    out[o] = static_cast<float>(all);
  }
}
template <class T>
void sums_portable(const T* g, int64_t outputs, int64_t positions, float* out) {
  sums(g, outputs, positions, out);
}
template <class T>
ADAMIX_AVX2 void sums_avx2(const T* g, int64_t outputs, int64_t positions, float* out) {
  sums(g, outputs, positions, out);
}
template <class T>
ADAMIX_AVX512 void sums_avx512(const T* g, int64_t outputs, int64_t positions, float* out) {
  sums(g, outputs, positions, out);
}

// Some positions of backprops [outputs, positions] as rows of a product, in memory that is the caller's if need be.
template <class T>
Tall by_output(const T* g, int64_t outputs, int64_t positions, int64_t rows, std::vector<float>& memory) {
  if constexpr (std::is_same_v<T, float>) return {g, positions, 1};
  memory.resize(outputs * rows);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t t = 0; t < rows; ++t) memory[o * rows + t] = narrow(g[o * positions + t]);
  return {memory.data(), rows, 1};
}

struct Workspace {
  std::vector<float> memory, tall, wide, weight, bias;
  std::vector<Box::Columns> columns;  // of each chunk of positions and each panel: the same for all samples
};

// One group of one sample: `out` [outputs, window] and `bias` [outputs] of that group. `after` numbers follow it.
template <class A, class G>
void one(const A* a, const G* g, int64_t after, const ConvShape& s, float* out, float* bias, Workspace& work) {
  const int64_t outputs = s.outputs / s.groups, window = s.window(), positions = s.positions();
  const int64_t panels = (window + kWide - 1) / kWide;
  const auto add = pick(add_portable<float>, add_avx2<float>, add_avx512<float>);
  float tile[kTall * kWide];
  work.columns.resize((positions + kDepth - 1) / kDepth * panels);
  if (positions == 0) std::fill_n(out, outputs * window, 0.0f);
  for (int64_t from = 0; from < positions; from += kDepth) {
    const int64_t rows = std::min(kDepth, positions - from);
    Box box(s, from, rows);
    bool in_place = false;
    if constexpr (std::is_same_v<A, float>) {
      in_place = after >= Box::kSlack && box.inside();
      if (in_place) box.view(a);
    }
    if (!in_place) box.fill(a, s.inputs / s.groups, work.memory);
    const Tall tall = by_output(g + from, outputs, positions, rows, work.tall);
    work.wide.resize(rows * kWide);
    for (int64_t column = 0; column < window; column += kWide) {
      const int64_t n = std::min<int64_t>(kWide, window - column);
      if (n < kWide) std::fill(work.wide.begin(), work.wide.end(), 0.0f);
      Box::Columns& columns = work.columns[from / kDepth * panels + column / kWide];
      if (columns.runs.empty() || columns.in_place != in_place) box.choose(column, n, columns);
      columns.in_place = in_place;
      box.copy(columns, from, rows, work.wide.data(), kWide);
      for (int64_t o = 0; o < outputs; o += kTall) {
        const int64_t height = std::min<int64_t>(kTall, outputs - o);
        const bool whole = n == kWide && from == 0;
        float* place = out + o * window + column;
        outer(height)(tall.from(o), work.wide.data(), rows, whole ? place : tile, whole ? window : kWide);
        for (int64_t r = 0; r < height && !whole; ++r)
          if (from == 0)
            std::memcpy(place + r * window, tile + r * kWide, n * sizeof(float));
          else
            add(place + r * window, 1, tile + r * kWide, n);
      }
    }
  }
  if (bias == nullptr) return;
  const auto sum = pick(sums_portable<G>, sums_avx2<G>, sums_avx512<G>);
  sum(g, outputs, positions, bias);
}

// A layer's factors, of any types, cut into groups of samples.
struct Layer {
  const void *activations, *backprops;
  DType a_type, g_type;
  int64_t samples;
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
            static_cast<const G*>(backprops) + k * outputs() * s.positions(), (samples * s.groups - 1 - k) * inputs(),
            s, weight, bias, work);
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
  const Layer layer{activations, backprops, a_type, g_type, samples, s};
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
  const Layer layer{activations, backprops, a_type, g_type, samples, s};
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
  const int64_t samples = coef.size();
  const Layer layer{activations, backprops, a_type, g_type, samples, s};
  const int64_t size = layer.weights() * s.groups;
  const int64_t parts = std::clamp<int64_t>(samples / 8, 1, 8);  // in a number that does not depend on the threads
  const auto add = pick(add_portable<double>, add_avx2<double>, add_avx512<double>);
  std::vector<std::vector<double>> totals(parts);
  constexpr int64_t kRun = 256;
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
    const int64_t all = size + (bias == nullptr ? 0 : s.outputs);
#pragma omp for schedule(static)
    for (int64_t start = 0; start < all; start += kRun) {
      const int64_t n = std::min(kRun, all - start);
      double sum[kRun] = {};
      for (const std::vector<double>& total : totals)
        for (int64_t i = 0; i < n; ++i) sum[i] += total[start + i];
      for (int64_t i = start; i < start + n; ++i)
        (i < size ? weight[i] : bias[i - size]) = static_cast<float>(sum[i - start]);
    }
  }
}

}  // namespace adamix
