"""Planted bugs of batches with public and private rows, and of the thresholds that public rows set."""

from __future__ import annotations

from mutant import Mutant

SUMS = "adamix_kernels/nn/sums.py"
MIXED = "adamix_kernels/nn/mixed.py"
ADAPTIVE = "adamix_kernels/nn/adaptive.py"
CLIPPED = "adamix_kernels/nn/clipped.py"
SECURE = "adamix_kernels/nn/secure.py"
TESTS = "tests/nn/test_mixed.py"
BOUNDS = "tests/nn/test_mixed_bounds.py"
STEPS = "tests/nn/test_mixed_steps.py"

NOISE_BY_LAYER = f"{BOUNDS}::test_each_layer_has_noise_of_its_own_threshold"

MIXED_MUTANTS = [
    Mutant(
        "private norms set the threshold too",
        SUMS,
        "self.set_threshold(norm_sq[split.public], layer)",
        "self.set_threshold(norm_sq, layer)",
        (f"{BOUNDS}::test_private_rows_do_not_reach_thresholds_or_the_public_part",),
    ),
    Mutant(
        "norms of all rows set a layer's threshold",
        CLIPPED,
        "sums.set_threshold(total_norm_sq([factors.norm_sq() for factors in public]), layer)",
        "sums.set_threshold(total_norm_sq([factors.norm_sq() for _, factors in parts]), layer)",
        (f"{BOUNDS}::test_private_rows_do_not_reach_thresholds_or_the_public_part",),
    ),
    Mutant(
        "all rows stay private after the public ones are summed",
        CLIPPED,
        "parts[i] = parameters, factors.take(split.private)",
        "parts[i] = parameters, factors",
        (f"{TESTS}::test_a_step_is_the_clipped_private_and_the_exact_public_sum",),
    ),
    Mutant(
        "noise by layer without the root of their number",
        SUMS,
        "std = math.sqrt(len(thresholds.layers)) * engine",
        "std = engine",
        (NOISE_BY_LAYER,),
    ),
    Mutant(
        "secure noise of layers without the root of their number",
        SECURE,
        "return limit * (self._engine.noise_multiplier * math.sqrt(layers))",
        "return limit * self._engine.noise_multiplier",
        (NOISE_BY_LAYER,),
    ),
    Mutant(
        "noise of layers is left in units of thresholds",
        SUMS,
        "        torch._foreach_mul_(sums, units)\n",
        "",
        (NOISE_BY_LAYER,),
    ),
    Mutant(
        "each micro-batch has its own threshold, and the noise the last",
        ADAPTIVE,
        "return name not in self._fixed and (last is None or self._engine.steps - last >= self.rule.every)",
        "return True",
        (f"{TESTS}::test_micro_batches_have_the_thresholds_of_the_first",),
    ),
    Mutant(
        "a start that clipped rows is replaced in the same step",
        ADAPTIVE,
        "        self._fixed.add(name)\n        return self.known(name)\n",
        "        return self.known(name)\n",
        (f"{STEPS}::test_a_start_that_clipped_a_row_holds_for_the_step",),
    ),
    Mutant(
        "noise of a step that public rows have set no threshold for is left out",
        SUMS,
        "if self.adaptive is not None and not self.adaptive.any_known():",
        "if False:",
        (f"{STEPS}::test_without_public_rows_a_due_threshold_is_an_error",),
    ),
    Mutant(
        "the noise shrinks with the public rows twice",
        MIXED,
        "torch._foreach_mul_(list(released), expected_batch_size / whole)",
        "torch._foreach_mul_(list(released), (expected_batch_size / whole) ** 2)",
        (f"{BOUNDS}::test_noise_of_the_whole_is_of_the_threshold",),
    ),
    Mutant(
        "public sums of a failed backward pass are kept",
        SUMS,
        "        self.public.begin_pass()\n",
        "",
        (f"{STEPS}::test_a_failed_backward_pass_leaves_no_public_sum",),
    ),
    Mutant(
        "public gradients meet private sums before the noise",
        CLIPPED,
        "sums.add_public(parameter._dp_name, total)",
        "sums.add(parameter, total / sums._divisor, layer)",
        (f"{BOUNDS}::test_a_huge_public_gradient_rounds_no_private_sum",),
    ),
    Mutant(
        "a public row that is not finite sets the threshold",
        ADAPTIVE,
        "found.double().where(found.isfinite(), largest)",
        "found.double()",
        (f"{BOUNDS}::test_public_rows_that_are_not_finite_are_no_threshold",),
    ),
    Mutant(
        "a slice from before the batch makes all rows public",
        MIXED,
        "if step != 1 or not all(-samples <= (end or 0) <= samples for end in (rows.start, rows.stop)):",
        "if step != 1 or max(rows.start or 0, rows.stop or 0) > samples:",
        (f"{STEPS}::test_public_rows_that_do_not_fit",),
    ),
    Mutant(
        "two parts of a layer have the noise of one",
        SUMS,
        "thresholds.check_counted(names)",
        "pass",
        (f"{BOUNDS}::test_noise_is_for_the_layers_that_were_clipped",),
    ),
]
