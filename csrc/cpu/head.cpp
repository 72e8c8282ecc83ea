// The private step of a softmax classifier on features, some rows at a time while they are in cache: logits, residuals,
// norms and factors of a block of rows, then its weighted outer products.
//
// A row's gradient is residual x feature^T. The bound holds for the residual that is summed, however exact its logits.

#include "head.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "barrier.h"
#include "blocks.h"
#include "float_state.h"
#include "isa.h"

namespace adamix {
namespace {

constexpr int64_t kUnitRows = 48;  // rows whose logits are made at a time, by one thread

// exp(x) for x <= 0 to 2 roundings; 0 where it is below the smallest normal number.
ADAMIX_INLINE float exp_of(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes, expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1;
  uint32_t bits, power;
  std::memcpy(&bits, &y, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 23;
  return x < -87.3f ? 0 : as_float(bits);
}

// The squared norm of its residual, and its loss; NaN where a logit is not finite.
struct Row {
  double square, loss;
};

// residual = softmax(logits + bias) - onehot. The label's entry is minus the sum of the others: where it is small, it
// is exact as they are.
ADAMIX_INLINE Row residual_of(const double* logits, const float* bias, int64_t n, int64_t label, float* residual) {
  constexpr int kParts = 16;
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  constexpr float kMost = std::numeric_limits<float>::max();
  float tops[kParts];
  std::fill_n(tops, kParts, -kMost);
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    residual[i] = static_cast<float>(logits[i] + (bias != nullptr ? bias[i] : 0));
    finite &= std::abs(residual[i]) <= kMost;
  }
  if (!finite) return {kNaN, kNaN};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int p = 0; p < kParts; ++p) tops[p] = residual[i + p] > tops[p] ? residual[i + p] : tops[p];
  for (; i < n; ++i) tops[0] = residual[i] > tops[0] ? residual[i] : tops[0];
  const float top = *std::max_element(tops, tops + kParts), own = residual[label] - top;
  for (i = 0; i < n; ++i) residual[i] = exp_of(residual[i] - top);
  const float own_exp = residual[label];
  residual[label] = 0;
  double sums[kParts] = {};
  for (i = 0; i + kParts <= n; i += kParts)
    for (int p = 0; p < kParts; ++p) sums[p] += residual[i + p];
  for (int p = 0; i < n; ++i, ++p) sums[p] += residual[i];
  double others = 0;
  for (int p = 0; p < kParts; ++p) others += sums[p];
  const double total = others + own_exp;
  const float scale = static_cast<float>(1 / total);
  for (i = 0; i < n; ++i) residual[i] *= scale;
  residual[label] = static_cast<float>(-others / total);
  return {sum_sq_of(DType::kFloat32)(residual, n), std::log(total) - own};
}
Row residual_portable(const double* logits, const float* bias, int64_t n, int64_t label, float* residual) {
  return residual_of(logits, bias, n, label, residual);
}
ADAMIX_AVX2 Row residual_avx2(const double* logits, const float* bias, int64_t n, int64_t label, float* residual) {
  return residual_of(logits, bias, n, label, residual);
}
ADAMIX_AVX512 Row residual_avx512(const double* logits, const float* bias, int64_t n, int64_t label, float* residual) {
  return residual_of(logits, bias, n, label, residual);
}

// out[r][o] = features of row `first` + r times row o of a matrix, in double across kDotDepth columns.
class Products {
 public:
  void run(const Source& features, int64_t first, int64_t rows, const Source& matrix, int64_t outputs, double* out) {
    const auto kernel = dot();
    const int64_t inputs = features.columns, stride = round_to(outputs, kDotY) + kDotSpill;
    block_.resize(round_to(rows, kDotX) * stride);
    std::fill_n(out, rows * outputs, 0.0);
    for (int64_t column = 0; column < inputs; column += kDotDepth) {
      const int64_t columns = std::min(kDotDepth, inputs - column), depth = round_to(columns, kLanes);
      x_.find(features, 1, first, 0, rows, column, columns, kDotX);
      w_.find(matrix, 1, 0, 0, outputs, column, columns, kDotY);
      for (int64_t o = 0; o < outputs; o += kDotY)
        for (int64_t r = 0; r < rows; r += kDotX)
          kernel(x_.at(r), w_.at(o), depth, block_.data() + r * stride + o, stride);
      for (int64_t r = 0; r < rows; ++r) add_to(out + r * outputs, block_.data() + r * stride, outputs);
    }
  }

 private:
  DotRows x_, w_;
  std::vector<float> block_;
};

// Makes the residuals of up to kUnitRows rows.
class Residuals {
 public:
  explicit Residuals(const Head& head)
      : head_(head),
        weight_(head.weight, DType::kFloat32, head.outputs, head.inputs),
        logits_(kUnitRows * head.outputs) {}

  void run(const Source& features, int64_t first, int64_t rows, const int64_t* labels, float* residual, Row* row) {
    const auto kernel = pick(residual_portable, residual_avx2, residual_avx512);
    const int64_t outputs = head_.outputs;
    products_.run(features, first, rows, weight_, outputs, logits_.data());
    for (int64_t r = 0; r < rows; ++r, residual += outputs)
      row[r] = kernel(logits_.data() + r * outputs, head_.bias, outputs, labels[r], residual);
  }

 private:
  const Head& head_;
  Dense weight_;
  Products products_;
  std::vector<double> logits_;
};

// Rows of a block: their residuals and features stay in the last cache, and the sums, which each block reads and
// writes, are met by enough of them.
int64_t block_rows(const Head& head) {
  const int64_t most = std::min((int64_t{1} << 20) / std::max<int64_t>(head.outputs, 1),
                                (int64_t{1} << 21) / std::max<int64_t>(head.inputs, 1));
  return std::clamp(most / kDepth * kDepth, kDepth, 32 * kDepth);
}

}  // namespace

double head_clip_sum_noise(const Head& head, double threshold, float* weight_sum, float* bias_sum, float* norm_sq,
                           const Noise* noise, int threads) {
  const int64_t inputs = head.inputs, outputs = head.outputs, most = std::min(block_rows(head), head.rows);
  const int64_t work = std::max<int64_t>(head.rows, 1) * inputs * outputs;
  std::vector<float> residual(most * outputs);
  std::vector<double> losses(head.rows), factors(most), shift(outputs);
  Scales scales(most);
  std::vector<Region> regions = cut_regions(outputs, inputs, 2 * threads);
  std::vector<std::vector<double>> totals(regions.size());
  const auto elements = [&](int64_t row) { return Tensor{head.features, inputs, head.dtype}.at(row, 0); };
  Barrier barrier;
  const FloatState state = FloatState::current();
#pragma omp parallel num_threads(threads) if (work > kSerial)
  {
    const FloatState::Hold hold(state);
    const Thread thread;
    Residuals residuals(head);
    Panels panels;
    const int64_t count = regions.size(), from = count * thread.index / thread.count,
                  to = count * (thread.index + 1) / thread.count;
    for (int64_t k = from; k < to; ++k) totals[k].assign(regions[k].size(), 0.0);
    for (int64_t start = 0; start < head.rows; start += most) {
      const int64_t rows = std::min(most, head.rows - start), units = (rows + kUnitRows - 1) / kUnitRows;
      const Dense features(elements(start), head.dtype, 1, inputs);
      for (int64_t unit = thread.index; unit < units; unit += thread.count) {
        const int64_t first = unit * kUnitRows, n = std::min(kUnitRows, rows - first);
        Row row[kUnitRows];
        std::vector<double> squares(n), norms(n);
        std::vector<float> bounds(n), coef(n);
        residuals.run(features, first, n, head.labels + start + first, residual.data() + first * outputs, row);
        features.squares(first, 0, n, squares.data());
        for (int64_t r = 0; r < n; ++r) norms[r] = row[r].square * (squares[r] + (head.bias != nullptr));
        round_up(norms, 2 * (inputs + outputs), bounds.data());
        std::copy_n(bounds.begin(), n, norm_sq + start + first);
        std::copy_n(bounds.begin(), n, norms.begin());
        clip_coef(norms.data(), n, threshold, coef.data());
        for (int64_t r = 0; r < n; ++r) {
          scales.set(first + r, coef[r], squares[r]);
          factors[first + r] = coef[r];
          losses[start + first + r] = coef[r] > 0 ? row[r].loss : 0;
        }
      }
      barrier.wait(thread.count);
      const Dense backprops(residual.data(), DType::kFloat32, 1, outputs);
      for (int64_t k = from; k < to; ++k)
        add_products({features, backprops, rows, 1}, scales, 0, rows, regions[k], panels, totals[k].data());
      const int64_t own = outputs * thread.index / thread.count, end = outputs * (thread.index + 1) / thread.count;
      for (int64_t r = 0; r < rows && head.bias != nullptr; ++r)
        for (int64_t o = own; o < end && factors[r] > 0; ++o) shift[o] += factors[r] * residual[r * outputs + o];
      barrier.wait(thread.count);
    }
    for (int64_t k = from; k < to; ++k) write_region(regions[k], totals[k].data(), inputs, weight_sum, noise, 0);
  }
  if (head.bias != nullptr)
    finish({{nullptr, outputs, DType::kFloat32}, bias_sum, static_cast<uint64_t>(outputs * inputs)}, 0, outputs,
           shift.data(), noise);
  double loss = 0;
  for (const double one : losses) loss += one;
  return loss;
}

void head_coordinates(const Head& head, const float* basis, int64_t rank, float* out, int threads) {
  const int64_t inputs = head.inputs, outputs = head.outputs, units = (head.rows + kUnitRows - 1) / kUnitRows;
  const int64_t size = outputs * (inputs + (head.bias != nullptr));
  const Dense features(head.features, head.dtype, 1, inputs);
  const FloatState state = FloatState::current();
#pragma omp parallel num_threads(threads) if (head.rows * inputs * outputs * (rank + 1) > kSerial)
  {
    const FloatState::Hold hold(state);
    Residuals residuals(head);
    Products products;
    std::vector<float> residual(kUnitRows * outputs);
    std::vector<double> pulled(kUnitRows * outputs);
    Row row[kUnitRows];
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t first = unit * kUnitRows, n = std::min(kUnitRows, head.rows - first);
      residuals.run(features, first, n, head.labels + first, residual.data(), row);
      for (int64_t k = 0; k < rank; ++k) {
        const Dense direction(basis + k * size, DType::kFloat32, outputs, inputs);
        const float* shift = head.bias != nullptr ? basis + k * size + outputs * inputs : nullptr;
        products.run(features, first, n, direction, outputs, pulled.data());
        for (int64_t r = 0; r < n; ++r) {
          double sum = 0;
          for (int64_t o = 0; o < outputs; ++o)
            sum += residual[r * outputs + o] * (pulled[r * outputs + o] + (shift != nullptr ? shift[o] : 0));
          out[(first + r) * rank + k] = static_cast<float>(sum);
        }
      }
    }
  }
}

}  // namespace adamix
