// The adaptive threshold: an order statistic of squared norms.

#include "quantile.h"

#include <algorithm>
#include <cmath>

namespace adamix {

float norm_quantile(std::vector<double>& values, int64_t rank) {
  const auto place = values.begin() + (rank - 1);
  std::nth_element(values.begin(), place, values.end(),
                   [](double a, double b) { return std::isnan(b) ? !std::isnan(a) : a < b; });
  return static_cast<float>(std::sqrt(*place));
}

}  // namespace adamix
