"""Planted bugs of compiled models, half precision and captured graphs."""

from __future__ import annotations

from mutant import Mutant

ENGINE = "adamix_kernels/nn/engine.py"
SUMS = "adamix_kernels/nn/sums.py"
PASSES = "adamix_kernels/nn/passes.py"
NOISE = "adamix_kernels/ops/noise.py"
COMPILED = "adamix_kernels/nn/compiled.py"
TAP = "adamix_kernels/nn/tap.py"
COMPILED_OPS = "adamix_kernels/nn/compiled_ops.py"

COMPILE_TESTS = "tests/nn/test_compile.py"
PRECISION_TESTS = "tests/nn/test_precision.py"

_LENT = "        if lent:\n            factors = owned(factors, lent)\n"

COMPILE_MUTANTS = [
    Mutant(
        "noise is captured in a CUDA graph",
        NOISE,
        "        if capturing():\n            raise RuntimeError(",
        "        if False:\n            raise RuntimeError(",
        (f"{PRECISION_TESTS}::test_noise_is_not_captured",),
    ),
    Mutant(
        "a private pass is captured in a CUDA graph",
        PASSES,
        "            if capturing() and not self.recorded:",
        "            if False:",
        (f"{PRECISION_TESTS}::test_a_private_pass_is_not_captured",),
    ),
    Mutant(
        "sums are rounded to the parameter's type before the noise",
        SUMS,
        "total if self.grid else total.to(sum_dtype(total))\n",
        "total if self.grid else total.to(parameter.dtype)\n",
        (
            f"{PRECISION_TESTS}::test_no_sample_in_half_precision_adds_more_than_the_threshold",
            "tests/nn/test_engine.py::test_sums_of_half_parameters_are_float32",
        ),
    ),
    Mutant(
        "compiled layers keep their ordinary gradient",
        COMPILED,
        "return x.detach() if isinstance(x, PRIVATE) else x",
        "return x",
        (f"{COMPILE_TESTS}::test_equal_uses_count_each[aot_eager-auto]",),
    ),
    Mutant(
        "equal uses in compiled code are made one",
        COMPILED,
        '"number": next(_uses)',
        '"number": 0',
        (f"{COMPILE_TESTS}::test_equal_uses_count_each[aot_eager-auto]",),
    ),
    Mutant(
        "what compiled code writes over is kept",
        PASSES,
        _LENT,
        "",
        (f"{COMPILE_TESTS}::test_compiled_steps_are_those_without[book_keeping-inductor]",),
    ),
    Mutant(
        "a compiled forward pass is used again after a step",
        COMPILED_OPS,
        "    if forward <= engine._passes.stale:",
        "    if False:",
        (f"{COMPILE_TESTS}::test_a_second_backward_is_refused",),
    ),
    Mutant(
        "doubts about the batch of compiled code are dropped",
        COMPILED_OPS,
        "    if doubtful and not rules.probing:",
        "    if False:",
        (
            f"{COMPILE_TESTS}::test_time_first_is_refused",
            f"{COMPILE_TESTS}::test_doubts_about_the_batch_are_refused",
        ),
    ),
    Mutant(
        "compiled autograd loses the end of a backward pass",
        TAP,
        "    if state is not None and (state.compiled_autograd_enabled or state.in_compiled_autograd_region):",
        "    if False:",
        (f"{COMPILE_TESTS}::test_compiled_autograd_is_refused[False-auto]",),
    ),
]
