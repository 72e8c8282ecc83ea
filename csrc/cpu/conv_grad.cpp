// Per-sample gradients of a convolution, one sample after the other: written out, their norms, or their weighted sum.
// For weights that are small beside what goes through them.

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "blocks.h"
#include "clip.h"
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
  const auto product = outer(), product_of_rest = outer(outputs % kTall == 0 ? kTall : outputs % kTall);
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
        (height == kTall ? product : product_of_rest)(tall.from(o), work.wide.data(), rows, whole ? place : tile,
                                                      whole ? window : kWide);
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

  // All groups of sample b.
  void sample(int64_t b, bool bias, Workspace& work) const {
    work.weight.resize(weights() * s.groups);
    work.bias.resize(s.outputs);
    for (int64_t group = 0; group < s.groups; ++group)
      gradient(b * s.groups + group, work.weight.data() + group * weights(),
               bias ? work.bias.data() + group * outputs() : nullptr, work);
  }
};

// The squared norm of a sample's gradient, with room for what float32 sums may lose.
class Norm {
 public:
  Norm(const Layer& layer, bool bias)
      : layer_(layer),
        bias_(bias),
        a_square_(sum_sq_of(layer.a_type)),
        g_square_(sum_sq_of(layer.g_type)),
        square_(sum_sq_of(DType::kFloat32)) {
    const ConvShape& s = layer.s;
    for (int axis = 0; axis < 3; ++axis)
      seen_ *= std::min<int64_t>(s.out[axis], (s.dilation[axis] * (s.kernel[axis] - 1)) / s.stride[axis] + 1);
  }

  // Of sample b, whose gradient lies in the workspace.
  float operator()(int64_t b, const Workspace& work) const {
    double total = 0;
    for (int64_t group = 0; group < layer_.s.groups; ++group)
      total += of_group(b * layer_.s.groups + group, work.weight.data() + group * layer_.weights(),
                        work.bias.data() + group * layer_.outputs());
    return round_up(total, norm_terms(layer_.s));
  }

 private:
  double of_group(int64_t k, const float* weight, const float* bias) const {
    const int64_t positions = layer_.s.positions(), outputs = layer_.outputs(), weights = layer_.weights();
    const int64_t a_size = size_of(layer_.a_type) * layer_.inputs();
    const int64_t g_size = size_of(layer_.g_type) * outputs * positions;
    const double a = a_square_(static_cast<const char*>(layer_.activations) + k * a_size, layer_.inputs());
    const double g = g_square_(static_cast<const char*>(layer_.backprops) + k * g_size, outputs * positions);
    double norm = square_(weight, weights);
    if (bias_) norm += square_(bias, outputs);
    norm = std::sqrt(norm) * (1 + 0x1p-30);
    // R, the sum of |a_t| |g_t|, is at most this: Cauchy-Schwarz, each input counted as often as it may be seen. Where
    // that is far from it, as beside large inputs that no window sees or whose backprops are 0, R itself.
    double r = std::sqrt((a * seen_ + (bias_ ? positions : 0)) * g) * (1 + 0x1p-30);
    if (!(guard(r) <= kFar * norm)) r = exact(k);
    const double whole = norm + guard(r);
    return whole * whole;
  }

  // What the float32 chains may have lost, and what underflowed; and room for other sums, see `sum_error`.
  double guard(double r) const {
    const int64_t positions = layer_.s.positions();
    const double chains = std::min(positions, kDepth) + positions / kDepth + 3;
    const double lost = chains * 0x1p-24 * r + (r > 0 ? positions * std::sqrt(layer_.weights()) * 0x1p-126 : 0);
    return lost + (std::min<double>(positions, 64) + 16 + positions / 128.0) * 0x1p-23 * r;
  }

  double exact(int64_t k) const {
    const ConvShape& s = layer_.s;
    const Groups all{0, s.groups};
    std::vector<double> a(s.positions()), g(s.positions());
    Windows(layer_.activations, layer_.a_type, s, all).squares(k, 0, s.positions(), a.data());
    Channels(layer_.backprops, layer_.g_type, s, all).squares(k, 0, s.positions(), g.data());
    double r = 0;
    for (int64_t t = 0; t < s.positions(); ++t) r += std::sqrt((a[t] + bias_) * g[t]);
    return r * (1 + 0x1p-30);
  }

  static constexpr double kFar = 4e-4;
  const Layer& layer_;
  bool bias_;
  SumSq a_square_, g_square_, square_;
  double seen_ = 1;  // how many windows see one input at most
};

// The sum of gradients times `factor(b, work)`, which finds sample b's there; those with `skips(b)` are not made.
template <class Skips, class Factor>
void sum_samples(const Layer& layer, Skips skips, Factor factor, float* weight, float* bias, int threads) {
  const ConvShape& s = layer.s;
  const int64_t size = layer.weights() * s.groups, all = size + (bias == nullptr ? 0 : s.outputs);
  // In a number that does not depend on the threads.
  const int64_t parts = std::clamp<int64_t>(layer.samples / 8, 1, 8);
  const auto add = pick(add_portable<double>, add_avx2<double>, add_avx512<double>);
  std::vector<std::vector<double>> totals(parts);
  constexpr int64_t kRun = 256;
  const FloatState state = FloatState::current();
#pragma omp parallel num_threads(threads) if (layer.samples * s.positions() * size > kSerial)
  {
    const FloatState::Hold hold(state);
    Workspace work;
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      std::vector<double>& total = totals[part];
      total.assign(all, 0.0);
      for (int64_t b = layer.samples * part / parts; b < layer.samples * (part + 1) / parts; ++b) {
        if (skips(b)) continue;
        layer.sample(b, bias != nullptr, work);
        const double coef = factor(b, work);
        if (!(coef > 0)) continue;
        add(total.data(), coef, work.weight.data(), size);
        if (bias != nullptr) add(total.data() + size, coef, work.bias.data(), s.outputs);
      }
    }
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

void conv_norm_sq_by_samples(const void* activations, DType a_type, const void* backprops, DType g_type,
                             int64_t samples, const ConvShape& s, bool bias, float* norm_sq, int threads) {
  const Layer layer{activations, backprops, a_type, g_type, samples, s};
  const Norm norm(layer, bias);
  const FloatState state = FloatState::current();
#pragma omp parallel num_threads(threads) if (samples * s.groups * s.positions() * layer.weights() > kSerial)
  {
    const FloatState::Hold hold(state);
    Workspace work;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < samples; ++b) {
      layer.sample(b, bias, work);
      norm_sq[b] = norm(b, work);
    }
  }
}

void conv_clip_sum_by_samples(const void* activations, DType a_type, const void* backprops, DType g_type,
                              const std::vector<double>& coef, const ConvShape& s, float* weight, float* bias,
                              int threads) {
  const Layer layer{activations, backprops, a_type, g_type, static_cast<int64_t>(coef.size()), s};
  sum_samples(
      layer, [&](int64_t b) { return !(coef[b] > 0); }, [&](int64_t b, const Workspace&) { return coef[b]; }, weight,
      bias, threads);
}

void conv_clip_sum_joined(const void* activations, DType a_type, const void* backprops, DType g_type,
                          std::vector<double>& norm_sq, double threshold, const ConvShape& s, float* weight,
                          float* bias, int threads) {
  const Layer layer{activations, backprops, a_type, g_type, static_cast<int64_t>(norm_sq.size()), s};
  const Norm norm(layer, bias != nullptr);
  const auto factor = [&](int64_t b, const Workspace& work) {
    norm_sq[b] += norm(b, work);
    if (std::isnan(norm_sq[b])) norm_sq[b] = std::numeric_limits<double>::infinity();  // of the others
    float coef;
    clip_coef(&norm_sq[b], 1, threshold, &coef);
    return coef;
  };
  sum_samples(layer, [](int64_t) { return false; }, factor, weight, bias, threads);
}

}  // namespace adamix
