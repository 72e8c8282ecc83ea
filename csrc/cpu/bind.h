#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "convert.h"

namespace adamix {

// Where a tensor lies, and what it holds.
using Address = std::pair<uintptr_t, DType>;

void bind_factored(pybind11::module_& m);

}  // namespace adamix
