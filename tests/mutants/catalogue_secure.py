"""Planted bugs of secure mode: the grid, the noise on it and its key."""

from __future__ import annotations

from mutant import Mutant

GRID = "adamix_kernels/ops/grid.py"
NOISE = "adamix_kernels/ops/noise.py"
GRID_SUMS = "adamix_kernels/nn/secure.py"
MECHANISM = "adamix/mechanism.py"

AUDIT_CHECKS = "tests/audit/test_audit_runs.py::test_the_checks_hold"
GRID_TESTS = "tests/kernels/test_grid.py"
SECURE_TESTS = "tests/nn/test_secure.py"
SECURE_RUNS = "tests/trainer/test_secure_mode.py"

_WHOLE = "return scaled.where(fits, 0.0).long(), fits.all(1)"
_MOST = "total = (total + q.square().sum(1).where(fits, most + 1)).clamp(max=most + 1)"
_STDS = "stds = [limit * (self.noise_multiplier * math.sqrt(len(limits))) for limit in limits]"
_KEY = "key = os.urandom(32) if seed is None else hashlib.blake2b(str(seed).encode(), digest_size=32).digest()"

SECURE_MUTANTS = [
    Mutant(
        "layers on the grid are together above the threshold by a rounding",
        GRID_SUMS,
        "            limit *= 1 - 2.0**-50",
        "            limit *= 1",
        (f"{SECURE_TESTS}::test_layers_together_are_not_above_the_threshold_by_a_rounding",),
    ),
    Mutant(
        "more rows than a sum on the grid holds",
        GRID_SUMS,
        "if rows > MOST_ROWS:",
        "if False:",
        (f"{SECURE_TESTS}::test_more_rows_than_a_sum_holds_are_refused",),
    ),
    Mutant(
        "whole numbers are rounded to nearest",
        GRID,
        _WHOLE,
        _WHOLE.replace(".long()", ".round().long()"),
        (f"{GRID_TESTS}::test_numbers_are_rounded_toward_zero",),
    ),
    Mutant(
        "whole numbers are rounded down",
        GRID,
        _WHOLE,
        _WHOLE.replace(".long()", ".floor().long()"),
        (f"{GRID_TESTS}::test_numbers_are_rounded_toward_zero",),
    ),
    Mutant(
        "the norm is not checked in whole numbers",
        GRID,
        "    factors = factors.where(total <= most, torch.nan)\n",
        "",
        (f"{GRID_TESTS}::test_the_bound_is_that_of_whole_numbers",),
    ),
    Mutant(
        "the norm of whole numbers is that of the last block",
        GRID,
        _MOST,
        _MOST.replace("total + ", ""),
        (f"{GRID_TESTS}::test_the_bound_is_that_of_whole_numbers",),
    ),
    Mutant(
        "the norm of whole numbers overflows",
        GRID,
        _MOST,
        _MOST.replace(".clamp(max=most + 1)", ""),
        (f"{GRID_TESTS}::test_a_norm_that_wraps_around_64_bits_is_seen",),
    ),
    Mutant(
        "the squared threshold is rounded up",
        GRID,
        "return math.floor(ratio), math.floor(ratio**2)",
        "return math.floor(ratio), math.ceil(ratio**2)",
        (f"{GRID_TESTS}::test_the_bound_is_that_of_whole_numbers",),
    ),
    Mutant(
        "samples with NaN are let through to the grid",
        GRID,
        ".where(fits, most + 1)",
        ".where(fits, 0)",
        (f"{GRID_TESTS}::test_samples_that_are_not_finite_add_nothing",),
    ),
    Mutant(
        "noise is not rounded to the grid",
        GRID,
        "(z * (std / grid)).round().long()",
        "z * (std / grid)",
        (f"{GRID_TESTS}::test_releases_are_multiples_of_the_grid",),
    ),
    Mutant(
        "noise on the grid is rounded down",
        GRID,
        "(z * (std / grid)).round().long()",
        "(z * (std / grid)).floor().long()",
        (f"{GRID_TESTS}::test_compiled_and_reference_noise_are_the_same_bits",),
    ),
    Mutant(
        "a grid too fine for its noise",
        GRID,
        "    if std:\n        exponent = max(",
        "    if False:\n        exponent = max(",
        (f"{GRID_TESTS}::test_the_grid_is_a_power_of_two_fine_enough_and_coarse_enough",),
    ),
    Mutant(
        "secure noise without the threshold",
        GRID_SUMS,
        "grid_release(sums, limit * engine.noise_multiplier, grid, engine.noise, offsets)",
        "grid_release(sums, engine.noise_multiplier, grid, engine.noise, offsets)",
        (AUDIT_CHECKS,),
    ),
    Mutant("secure noise x 0.95", GRID_SUMS, "(sums, limit *", "(sums, 0.95 * limit *", (AUDIT_CHECKS,)),
    Mutant(
        "the trainer's secure noise without the threshold",
        MECHANISM,
        _STDS,
        _STDS.replace("limit * ", ""),
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "the trainer's secure noise x 0.95",
        MECHANISM,
        _STDS,
        _STDS.replace("limit *", "0.95 * limit *"),
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "layers' secure noise without the root of their number",
        MECHANISM,
        _STDS,
        _STDS.replace(" * math.sqrt(len(limits))", ""),
        (f"{SECURE_RUNS}::test_the_noise_has_the_stated_standard_deviation",),
    ),
    Mutant(
        "sums and noise in floating point in secure mode",
        MECHANISM,
        'if self.noise.mode == "secure":',
        "if False:",
        (f"{SECURE_RUNS}::test_every_output_is_a_multiple_of_the_grid",),
    ),
    Mutant(
        "the engine's secure noise is added in floating point",
        GRID_SUMS,
        "        released = grid_release(sums, limit * engine.noise_multiplier, grid, engine.noise, offsets)\n",
        "        from adamix_kernels.ops.noise import add_gaussian_noise_\n\n"
        "        released = [s.float() * grid for s in sums]\n"
        "        add_gaussian_noise_(released, limit * engine.noise_multiplier, engine.noise)\n",
        (f"{SECURE_TESTS}::test_every_output_is_a_multiple_of_the_grid",),
    ),
    Mutant(
        "secure noise is that of Philox",
        NOISE,
        'stream = _streams.chacha20 if self.mode == "secure" else _streams.philox',
        "stream = _streams.philox",
        ("tests/kernels/test_noise.py::test_stream_is_that_of_plain_python", "tests/kernels/test_noise.py"),
    ),
    Mutant(
        "the key of ChaCha is fixed",
        NOISE,
        _KEY,
        _KEY.replace("if seed is None", 'if seed is None and mode == "fast"'),
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "the key of ChaCha has 32 bits",
        NOISE,
        _KEY,
        _KEY.replace("os.urandom(32)", "os.urandom(4) * 8"),
        ("tests/kernels/test_noise.py::test_keys_of_the_system_are_whole",),
    ),
    Mutant(
        "the trainer's noise is fast in secure mode",
        "adamix/trainer.py",
        "Noise(config.noise_seed, config.noise_mode)",
        "Noise(config.noise_seed)",
        (f"{SECURE_RUNS}::test_the_run_draws_from_the_source_it_was_asked_for",),
    ),
    Mutant(
        "the threshold changes within a step on a grid",
        GRID_SUMS,
        "        elif limits != self._limits:\n",
        "        elif False:\n",
        (f"{SECURE_TESTS}::test_the_threshold_may_change_between_steps_only",),
    ),
]
