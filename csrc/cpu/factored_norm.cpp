// Squared norms of gradients in factors, g^T a, tile by tile: neither T x T nor I x O numbers are ever stored.
//
// Float32 products whose rounding is bounded, sums of them in double: the same bits for every thread count.

#include <cmath>
#include <numeric>

#include "blocks.h"
#include "factored.h"
#include "float_state.h"
#include "isa.h"
#include "panels.h"

namespace adamix {
namespace {

constexpr double kUnit = 0x1p-24;                // relative error of one rounding to float32
constexpr double kSmall = 0x1p-126;              // what underflow may lose of a product, where denormals are flushed
constexpr int64_t kTallBlock = 96;               // outputs of a task of `direct`
constexpr int64_t kGramT = 48;                   // positions of a task of `gram` ..
constexpr int64_t kGramS = 96;                   // .. and how many it meets at a time ..
constexpr int64_t kStride = kGramS + kDotSpill;  // .. in rows of so many numbers
// Relative error of a dot of float32 rows: of kDotDepth numbers at most, by `dot`, the products rounded too. Two more
// for second-order terms and the roundings of the norms it is relative to.
double dot_error(int64_t columns) { return (std::min(columns, kDotDepth) / dot_chains() + 8) * kUnit; }

// Powers of 2 that the factors of a sample are multiplied with.
struct Scale {
  float a, g;
};

// Brings the largest of some lengths within 2^-20 .. 2^20 by a power of 2, and raises them, but for zeros, to where
// what underflows in a dot is less than its error relative to them.
float scale_of(double* lengths, int64_t count) {
  constexpr double kLeast = 0x1p-46;
  const double most = count > 0 ? *std::max_element(lengths, lengths + count) : 0;
  const bool usual = (most >= 0x1p-20 && most <= 0x1p20) || most == 0 || !std::isfinite(most);
  const double scale = usual ? 1 : std::ldexp(1.0, -std::clamp(std::ilogb(most), -120, 120));
  for (int64_t t = 0; t < count; ++t) lengths[t] = lengths[t] == 0 ? 0 : std::max(scale * lengths[t], kLeast);
  return static_cast<float>(scale);
}

// |a_t|, |g_t| for each position of each sample, and per sample R = sum_t |a_t| |g_t|, the bias being an input of 1.
struct Lengths {
  std::vector<double> a, g, r;

  explicit Lengths(const Factors& f) : a(f.samples * f.positions), g(a.size()), r(f.samples) {}

  // By all threads of a parallel region.
  void measure(const Factors& f, bool bias) {
    constexpr int64_t kShare = 256;  // positions
    const int64_t shares = (f.positions + kShare - 1) / kShare;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < f.samples * shares; ++task) {
      const int64_t sample = task / shares, first = task % shares * kShare;
      const int64_t n = std::min(kShare, f.positions - first), at = sample * f.positions + first;
      f.activations.squares(sample, first, n, a.data() + at);
      f.backprops.squares(sample, first, n, g.data() + at);
      for (int64_t k = at; k < at + n; ++k) {
        a[k] = std::sqrt(a[k] + bias);
        g[k] = std::sqrt(g[k]);
      }
    }
  }

  void add_up(int64_t positions) {
    for (size_t b = 0; b < r.size(); ++b)
      r[b] =
          std::inner_product(a.data() + b * positions, a.data() + (b + 1) * positions, g.data() + b * positions, 0.0);
  }

  std::vector<Scale> bring_near_one(int64_t positions) {
    std::vector<Scale> scales;
    for (size_t b = 0; b < r.size(); ++b)
      scales.push_back({scale_of(a.data() + b * positions, positions), scale_of(g.data() + b * positions, positions)});
    add_up(positions);
    return scales;
  }
};

// What a task needs besides its result; a thread reuses it.
struct Workspace {
  std::vector<Panels> chunks;
  std::vector<double> total;
  DotRows rows_t, rows_s;
  std::vector<float> block, x_once, y_once;
  std::vector<double> x, y;
};

// Sum of squares of the gradient's entries, for the outputs `outer` and on: of the bias too.
double direct_task(const Factors& f, bool bias, int64_t sample, int64_t outer, Workspace& work) {
  const int64_t inputs = f.activations.columns, tall = std::min(kTallBlock, f.backprops.columns - outer);
  const int64_t from = sample * f.positions, chunks = (f.positions + kDepth - 1) / kDepth;
  const auto rows = [&](int64_t c) { return std::min(kDepth, f.positions - c * kDepth); };
  work.chunks.resize(std::max<int64_t>(chunks, work.chunks.size()));
  for (int64_t c = 0; c < chunks; ++c)
    work.chunks[c].pack_tall(f.backprops, f.positions, from + c * kDepth, rows(c), outer, tall, nullptr);
  double sum = 0;
  for (int64_t inner = 0; inner < inputs; inner += kWide) {
    const Region region{outer, tall, inner, std::min<int64_t>(kWide, inputs - inner)};
    for (int64_t c = 0; c < chunks; ++c) {
      Panels& panels = work.chunks[c];
      panels.pack_wide(f.activations, f.positions, from + c * kDepth, rows(c), inner, region.wide, nullptr, nullptr);
      if (chunks == 1) {
        sum += panels.square();
        continue;
      }
      if (c == 0) work.total.assign(region.size(), 0.0);
      panels.add(work.total.data(), region.stride());
    }
    if (chunks > 1) sum += square_sum(work.total.data(), region.size());
  }
  if (bias) {
    work.x.assign(tall, 0.0);
    work.block.resize(tall);
    for (int64_t t = 0; t < f.positions; ++t) {
      f.backprops.read(sample, t, 1, outer, tall, work.block.data(), tall);
      add_to(work.x.data(), work.block.data(), tall);
    }
    sum += square_sum(work.x.data(), tall);
  }
  return sum;
}

// Rows t0 .. t0 + nt of a sample meet rows s0 .. s0 + ns.
struct Block {
  int64_t sample, t0, nt, s0, ns;
};

// out[t][s] = dot of the columns `first` and on of rows t0 + t and s0 + s, kDotDepth of them at most, in rows of
// kStride; only where s is not above t.
void dots(const Source& source, float scale, const Block& b, int64_t first, Workspace& work, std::vector<float>& out) {
  const auto kernel = dot();
  const int64_t columns = std::min(kDotDepth, source.columns - first), depth = round_to(columns, kLanes);
  out.resize(kGramT * kStride);
  work.rows_t.find(source, scale, b.sample, b.t0, b.nt, first, columns, kDotX);
  work.rows_s.find(source, scale, b.sample, b.s0, b.ns, first, columns, kDotY);
  for (int64_t s = 0; s < b.ns; s += kDotY)
    for (int64_t t = std::max<int64_t>(0, (b.s0 + s - b.t0) / kDotX * kDotX); t < b.nt; t += kDotX)
      // What is lost to the right is of other s: written later, or never read.
      kernel(work.rows_t.at(t), work.rows_s.at(s), depth, out.data() + t * kStride + s, kStride);
}

// The same of all columns, kDotDepth by kDotDepth.
void dots(const Source& source, float scale, const Block& b, Workspace& work, std::vector<double>& out) {
  out.assign(kGramT * kStride, 0.0);
  for (int64_t first = 0; first < source.columns; first += kDotDepth) {
    dots(source, scale, b, first, work, work.block);
    for (int64_t t = 0; t < b.nt; ++t) {
      const int64_t n = std::min(b.ns, b.t0 + t - b.s0 + 1);
      if (n > 0) add_to(out.data() + t * kStride, work.block.data() + t * kStride, n);
    }
  }
}

// What a block of dots adds to the squared norm, and to its error.
struct Sums {
  double product = 0, x = 0, y = 0;
};

// Rows of dots of positions t with s = 0, 1, ..: lengths |a|, |g| of the t and of the s. Row r meets columns up to
// diagonal + r, which is t itself, each twice but for the last. For the error twice is near enough there.
template <class T>
struct Meeting {
  const T *x, *y;
  const double *a_t, *g_t, *a_s, *g_s;
  int64_t rows, columns, diagonal;
  double one;
};
template <class T>
ADAMIX_INLINE Sums meet(const Meeting<T>& m) {
  constexpr int kParts = 16;
  double product[kParts] = {}, off_x[kParts] = {}, off_y[kParts] = {}, once = 0;
  for (int64_t r = 0; r < m.rows; ++r) {
    const T *x = m.x + r * kStride, *y = m.y + r * kStride;
    const double a_t = m.a_t[r], g_t = m.g_t[r];
    const int64_t n = std::min(m.columns, m.diagonal + r + 1);
    const auto take = [&](int64_t i, int p) {
      const double dot = x[i] + m.one, other = y[i];
      product[p] += dot * other;
      off_x[p] += g_t * m.g_s[i] * std::abs(dot);
      off_y[p] += a_t * m.a_s[i] * std::abs(other);
    };
    int64_t i = 0;
    for (; i + kParts <= n; i += kParts)
      for (int p = 0; p < kParts; ++p) take(i + p, p);
    for (int p = 0; i < n; ++i, ++p) take(i, p);
    if (n > 0 && n == m.diagonal + r + 1) once += (x[n - 1] + m.one) * y[n - 1];
  }
  Sums sums;
  for (int p = 0; p < kParts; ++p) {
    sums.product += 2 * product[p];
    sums.x += 2 * off_x[p];
    sums.y += 2 * off_y[p];
  }
  sums.product -= once;
  return sums;
}
template <class T>
Sums meet_portable(const Meeting<T>& m) {
  return meet(m);
}
template <class T>
ADAMIX_AVX2 Sums meet_avx2(const Meeting<T>& m) {
  return meet(m);
}
template <class T>
ADAMIX_AVX512 Sums meet_avx512(const Meeting<T>& m) {
  return meet(m);
}

// For the positions t0 and on, sum over them and all s of (a_t.a_s)(g_t.g_s), by symmetry from s <= t; and how far it
// may be off: computed dots x, y are, by at most p |a_t||a_s| and q |g_t||g_s|, so their product is by at most
// p |a_t||a_s||y| + q |g_t||g_s||x| + p q |a_t||a_s||g_t||g_s|. The last is left to the caller: it adds up to p q R^2.
Sums gram_task(const Factors& f, bool bias, Scale scale, int64_t sample, int64_t t0, const double* a, const double* g,
               Workspace& work) {
  const int64_t nt = std::min(kGramT, f.positions - t0);
  const double one = bias ? static_cast<double>(scale.a) * scale.a : 0;
  const double p = dot_error(f.activations.columns), q = dot_error(f.backprops.columns);
  const bool once = std::max(f.activations.columns, f.backprops.columns) <= kDotDepth;
  Sums total;
  for (int64_t s0 = 0; s0 < t0 + nt; s0 += kGramS) {
    const Block block{sample, t0, nt, s0, std::min(kGramS, t0 + nt - s0)};
    const auto sum = [&](const auto& x, const auto& y) {
      using T = std::decay_t<decltype(x[0])>;
      const auto kernel = pick(meet_portable<T>, meet_avx2<T>, meet_avx512<T>);
      return kernel({x.data(), y.data(), a + t0, g + t0, a + s0, g + s0, nt, block.ns, t0 - s0, one});
    };
    Sums sums;
    if (once) {
      dots(f.activations, scale.a, block, 0, work, work.x_once);
      dots(f.backprops, scale.g, block, 0, work, work.y_once);
      sums = sum(work.x_once, work.y_once);
    } else {
      dots(f.activations, scale.a, block, work, work.x);
      dots(f.backprops, scale.g, block, work, work.y);
      sums = sum(work.x, work.y);
    }
    total.product += sums.product;
    total.x += q * sums.x;
    total.y += p * sums.y;
  }
  return total;
}

}  // namespace

std::vector<double> factored_norm_sq(const Factors& f, bool bias, bool gram, int threads) {
  const int64_t inputs = f.activations.columns, outputs = f.backprops.columns, positions = f.positions;
  const int64_t parts = positions == 1 ? 0
                        : gram         ? (positions + kGramT - 1) / kGramT
                                       : (outputs + kTallBlock - 1) / kTallBlock;
  std::vector<Sums> partial(f.samples * parts);
  Lengths lengths(f), scaled(f);
  std::vector<Scale> scales;
  const int64_t products = std::min(inputs * outputs, positions * (inputs + outputs)) * (positions > 1);
  const FloatState state = FloatState::current();
#pragma omp parallel num_threads(threads) if (f.samples * positions * (inputs + outputs + products) > kSerial)
  {
    const FloatState::Hold hold(state);
    Workspace work;
    lengths.measure(f, bias);
#pragma omp single
    {
      lengths.add_up(positions);
      scaled = lengths;
      scales = scaled.bring_near_one(positions);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < static_cast<int64_t>(partial.size()); ++task) {
      const int64_t sample = task / parts, part = parts - 1 - task % parts;  // the largest of `gram` first
      const int64_t from = sample * positions;
      partial[sample * parts + part] = gram ? gram_task(f, bias, scales[sample], sample, part * kGramT,
                                                        scaled.a.data() + from, scaled.g.data() + from, work)
                                            : Sums{direct_task(f, bias, sample, part * kTallBlock, work)};
    }
  }
  std::vector<double> result(f.samples);
  const double p = dot_error(inputs), q = dot_error(outputs);
  const double room = (std::min<double>(positions, 64) + 16 + positions / 128.0) * 0x1p-23;  // see `sum_error`
  for (int64_t b = 0; b < f.samples; ++b) {
    const double r = lengths.r[b];
    Sums sum;
    for (int64_t k = b * parts; k < (b + 1) * parts; ++k) {
      sum.product += partial[k].product;
      sum.x += partial[k].x;
      sum.y += partial[k].y;
    }
    double norm = r;
    if (positions > 1 && gram) {
      const double roundings = (2 * positions + inputs / kDotDepth + outputs / kDotDepth + 64) * 0x1p-52;
      const double above = sum.product + sum.x + sum.y + (p * q + roundings) * scaled.r[b] * scaled.r[b];
      norm = std::sqrt(above < 0 ? 0 : above) / scales[b].a / scales[b].g;
    } else if (positions > 1) {
      const double entries = std::sqrt(static_cast<double>(outputs) * (inputs + 1));
      norm = std::sqrt(sum.product) + (std::min(positions, kDepth) + 2) * kUnit * r +
             (r > 0 ? positions * entries * kSmall : 0);
    }
    result[b] = (norm + room * r) * (norm + room * r);
  }
  return result;
}

}  // namespace adamix
