"""Planted bugs of what is seldom used together: captures and what they cannot hold, and pairs of ways to train."""

from __future__ import annotations

from mutant import Mutant

PASSES = "adamix_kernels/nn/passes.py"
GRAPHED = "adamix_kernels/nn/graphed.py"

LIMITS = "tests/nn/test_graphed_limits.py"

COMBO_MUTANTS = [
    Mutant(
        "a capture makes samples count in another engine",
        PASSES,
        "            if Passes._recording not in (None, self):",
        "            if False:",
        (f"{LIMITS}::test_a_loss_that_does_more_is_refused",),
    ),
    Mutant(
        "a replay does not see gradients that are dropped",
        GRAPHED,
        "        self._engine._attached.watch()",
        "        pass",
        (f"{LIMITS}::test_gradients_dropped_by_hand_are_dropped_after_a_step_that_failed",),
    ),
    Mutant(
        "a capture drops the sums of a step",
        "adamix_kernels/nn/engine.py",
        '        self._passes.check_unrecorded("zero_grad()")\n',
        "",
        (f"{LIMITS}::test_a_loss_that_does_more_is_refused",),
    ),
    Mutant(
        "labels of replays are not looked at",
        "adamix_kernels/nn/checks.py",
        "    if recorded:\n        raise",
        "    if False:\n        raise",
        (f"{LIMITS}::test_labels_that_no_replay_looks_at_are_refused",),
    ),
    Mutant(
        "samples of a function without a rule are not compared in replays",
        "adamix_kernels/nn/rules_generic.py",
        "    if rules.engine._passes.recorded:\n        raise",
        "    if False:\n        raise",
        (f"{LIMITS}::test_a_function_whose_rows_are_compared_is_refused",),
    ),
    Mutant(
        "a rank outside of the group goes on without a charge",
        "adamix/parts.py",
        "    if dist.get_rank(group) < 0:",
        "    if False:",
        ("tests/distributed/test_rank_combinations.py::test_a_rank_outside_of_the_group_is_told",),
    ),
    Mutant(
        "lengths of batches that a model compiled in place refuses are private",
        "adamix/deep/compiling.py",
        "    return any(module._compiled_call_impl is not None for module in model.modules())",
        "    return False",
        ("tests/deep/test_deep_trainer.py::test_compiled_models_whose_rows_would_show",),
    ),
    Mutant(
        "random numbers of the host are those of the capture",
        GRAPHED,
        "        if _draws_of_host(self._device) != drawn:",
        "        if False:",
        (f"{LIMITS}::test_random_numbers_of_the_host_are_refused",),
    ),
]
