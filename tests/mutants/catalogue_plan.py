"""Planted bugs of planning: budgets that are told too small, and rules that a plan must not switch off in training."""

from __future__ import annotations

from mutant import Mutant

ACCOUNTING = "adamix/plan/accounting.py"
COMMANDS = "adamix/cli_plan.py"
TRACE = "adamix/plan/trace.py"
GENERIC = "adamix_kernels/nn/rules_generic.py"
PARAMETER = "adamix_kernels/nn/parameter.py"

ESTIMATES = "tests/plan/test_plan_estimate.py"
TRACES = "tests/plan/test_plan_trace.py"

PLAN_MUTANTS = [
    Mutant(
        "a planned run ends before its last epoch does",
        ACCOUNTING,
        "steps = math.ceil(epochs * private_rows / batch)",
        "steps = math.floor(epochs * private_rows / batch)",
        (f"{ESTIMATES}::test_a_part_of_an_epoch_is_a_whole_step",),
    ),
    Mutant(
        "a plan's noise is that of rows sampled one by one",
        ACCOUNTING,
        "rate = batch / private_rows",
        "rate = 1 / private_rows",
        (f"{ESTIMATES}::test_accounting_is_that_of_the_trainer",),
    ),
    Mutant(
        "a plan accepts a delta of 1/N without a word",
        COMMANDS,
        "if found.delta >= 1 / found.private_rows:",
        "if found.delta > 1 / found.private_rows:",
        (f"{ESTIMATES}::test_the_command_warns",),
    ),
    Mutant(
        "functions without a rule may mix samples",
        GENERIC,
        "if not out.shape[0] or out.is_meta:",
        "if not out.is_meta:",
        ("tests/nn/test_attribution.py",),
    ),
    Mutant(
        "tensors on the meta device are all one",
        PARAMETER,
        "return whole._cdata if x.is_meta else whole.data_ptr()",
        "return whole.data_ptr()",
        (f"{TRACES}::test_the_ops_are_those_of_the_real_step", f"{TRACES}::test_memory_is_that_of_the_real_step"),
    ),
    Mutant(
        "the sums of a plan are not held until the step",
        TRACE,
        'self._purpose = "sums" if "clip_sum" in op.name else None',
        "self._purpose = None",
        (f"{TRACES}::test_accumulated_sums_are_held",),
    ),
]
