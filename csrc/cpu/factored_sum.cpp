// Weighted sums of gradients in factors: one product of matrices over all samples and positions.
//
// A task owns a region of the result and adds chunks of up to kDepth positions to it in order, in double: the same bits
// for every thread count.

#include <cmath>

#include "blocks.h"
#include "factored.h"
#include "float_state.h"
#include "panels.h"

namespace adamix {

Scales::Scales(const Source& activations, const std::vector<double>& coef, int64_t positions, int threads)
    : wide(coef.size() * positions), tall(wide.size()) {
  constexpr int64_t kShare = 256;  // positions
  const int64_t samples = coef.size(), shares = (positions + kShare - 1) / kShare;
  const FloatState state = FloatState::current();
#pragma omp parallel for num_threads(threads) schedule(static) if (samples * positions * activations.columns > kSerial)
  for (int64_t task = 0; task < samples * shares; ++task) {
    const FloatState::Hold hold(state);
    const int64_t sample = task / shares, first = task % shares * kShare, n = std::min(kShare, positions - first);
    double squares[kShare] = {};
    if (coef[sample] > 0) activations.squares(sample, first, n, squares);
    for (int64_t t = 0; t < n; ++t) set(sample * positions + first + t, coef[sample], squares[t]);
  }
}

void Scales::set(int64_t k, double factor, double square) {
  const int exponent = square > 0 && std::isfinite(square) ? std::clamp(std::ilogb(square) / 2, -100, 100) : 0;
  wide[k] = static_cast<float>(std::ldexp(1.0, -exponent));
  tall[k] = factor > 0 ? std::ldexp(factor, exponent) : 0;
}

std::vector<Region> cut_regions(int64_t outputs, int64_t inputs, int64_t least) {
  const auto even = [](int64_t size, int64_t most, int64_t unit) {
    const int64_t parts = (std::max<int64_t>(size, 1) + most - 1) / most;
    return round_to((std::max<int64_t>(size, 1) + parts - 1) / parts, unit);
  };
  const int64_t tall = even(outputs, kTallest, kTall);
  int64_t wide = kWidest;
  while (wide > kWide && ((outputs + tall - 1) / tall) * ((inputs + wide - 1) / wide) < least) wide -= kWide;
  std::vector<Region> regions;
  for (int64_t o = 0; o < outputs; o += tall)
    for (int64_t i = 0; i < inputs; i += wide)
      regions.push_back({o, std::min(tall, outputs - o), i, std::min(wide, inputs - i)});
  return regions;
}

void add_products(const Factors& f, const Scales& scales, int64_t first, int64_t samples, const Region& region,
                  Panels& panels, double* total) {
  // A sample of several positions has chunks of its own: its large terms, which may cancel, must not stand where
  // another is rounded. Samples of one position, which are no larger than they are clipped to, share a chunk.
  const int64_t pieces = (f.positions + kDepth - 1) / kDepth, together = f.positions == 1 ? kDepth : 1;
  const int64_t depth = f.positions == 1 ? kDepth : (f.positions + pieces - 1) / pieces;
  for (int64_t sample = first; sample < first + samples; sample += together) {
    const int64_t from = sample * f.positions, to = std::min(sample + together, first + samples) * f.positions;
    for (int64_t k = from; k < to; k += depth) {
      const int64_t n = std::min(depth, to - k);
      const double* tall = scales.tall.data() + k;
      if (std::all_of(tall, tall + n, [](double factor) { return factor == 0; })) continue;
      panels.pack_tall(f.backprops, f.positions, k, n, region.outer, region.tall, tall);
      panels.pack_wide(f.activations, f.positions, k, n, region.inner, region.wide, scales.wide.data() + k, tall);
      panels.add(total, region.stride());
    }
  }
}

void write_region(const Region& region, const double* total, int64_t inputs, float* out, const Noise* noise,
                  uint64_t offset) {
  const Part row{{nullptr, inputs, DType::kFloat32}, out, offset};
  for (int64_t o = 0; o < region.tall; ++o)
    finish(row, (region.outer + o) * inputs + region.inner, region.wide, total + o * region.stride(), noise);
}

void factored_sum(const Factors& f, const std::vector<double>& coef, float* out, const Noise* noise, uint64_t offset,
                  int threads) {
  const int64_t inputs = f.activations.columns, outputs = f.backprops.columns, rows = f.samples * f.positions;
  const Scales scales(f.activations, coef, f.positions, threads);
  const std::vector<Region> regions = cut_regions(outputs, inputs, 4);
  const int64_t count = regions.size();
  // Few regions, many positions: these are split too, in a number of parts that follows from the shapes alone.
  const int64_t parts = count >= 4 ? 1 : std::clamp<int64_t>(std::min(rows / (8 * kDepth), f.samples), 1, 8);
  std::vector<std::vector<double>> totals(parts * count);
  const FloatState state = FloatState::current();
#pragma omp parallel num_threads(threads) if (rows * inputs * outputs > kSerial)
  {
    const FloatState::Hold hold(state);
    Panels panels;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < parts * count; ++task) {
      const Region& region = regions[task % count];
      const int64_t first = f.samples * (task / count) / parts, last = f.samples * (task / count + 1) / parts;
      std::vector<double> total(region.size(), 0.0);
      if (f.positions > 0) add_products(f, scales, first, last - first, region, panels, total.data());
      if (parts == 1)
        write_region(region, total.data(), inputs, out, noise, offset);
      else
        totals[task] = std::move(total);
    }
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < (parts == 1 ? 0 : count); ++k) {
      std::vector<double>& total = totals[k];
      for (int64_t part = 1; part < parts; ++part)
        for (size_t i = 0; i < total.size(); ++i) total[i] += totals[part * count + k][i];
      write_region(regions[k], total.data(), inputs, out, noise, offset);
    }
  }
}

void bias_sum(const Factors& f, const std::vector<double>& coef, float* out, const Noise* noise, uint64_t offset,
              int threads) {
  constexpr int64_t kColumns = 256;
  const int64_t outputs = f.backprops.columns;
  const FloatState state = FloatState::current();
#pragma omp parallel for num_threads(threads) schedule(static) if (f.samples * f.positions * outputs > kSerial)
  for (int64_t o = 0; o < outputs; o += kColumns) {
    const FloatState::Hold hold(state);
    const int64_t n = std::min(kColumns, outputs - o);
    float row[kColumns];
    double sample[kColumns], total[kColumns] = {};
    for (int64_t b = 0; b < f.samples; ++b) {
      if (!(coef[b] > 0)) continue;
      std::fill_n(sample, n, 0.0);
      for (int64_t t = 0; t < f.positions; ++t) {
        f.backprops.read(b, t, 1, o, n, row, n);
        add_to(sample, row, n);
      }
      for (int64_t i = 0; i < n; ++i) total[i] += coef[b] * sample[i];
    }
    finish({{nullptr, outputs, DType::kFloat32}, out, offset}, o, n, total, noise);
  }
}

}  // namespace adamix
