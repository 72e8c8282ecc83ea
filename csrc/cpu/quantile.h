#pragma once

#include <cstdint>
#include <vector>

namespace adamix {

// Square root of the value that has `rank` - 1 of the others at or below it; NaN counts as the largest. `values` are
// reordered.
float norm_quantile(std::vector<double>& values, int64_t rank);

}  // namespace adamix
