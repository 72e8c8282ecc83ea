"""Planted bugs of a plan's sharding, options and ratios; those of its accounting are in `catalogue_plan`."""

from __future__ import annotations

from mutant import Mutant

ESTIMATE = "adamix/plan/estimate.py"
FUNCTIONS = "adamix/plan/functions.py"
SHARDING = "adamix/plan/sharding.py"
STEPS = "adamix/plan/steps.py"
TRACE = "adamix/plan/trace.py"
RANKS = "adamix_kernels/nn/ranks.py"

ESTIMATES = "tests/plan/test_plan_estimate.py"
TRACES = "tests/plan/test_plan_trace.py"
SENT = "tests/distributed/test_planned_ranks.py"
BYTES_SENT = f"{SENT}::test_the_planned_bytes_are_sent"

PLANNED_MUTANTS = [
    Mutant(
        "a plan's root is gathered again in the backward pass",
        SHARDING,
        "else gathered - root",
        "else gathered",
        (BYTES_SENT,),
    ),
    Mutant(
        "a plan's secure sums are float32",
        SHARDING,
        'return _GRID_SUM if setting.noise_mode == "secure" else _SUM',
        "return _SUM",
        (BYTES_SENT,),
    ),
    Mutant(
        "a plan forgets the sums of public rows between ranks",
        SHARDING,
        '            if setting.public_rows:\n                yield Message("reduce-scatter of public sums"',
        '            if False:\n                yield Message("reduce-scatter of public sums"',
        (BYTES_SENT,),
    ),
    Mutant(
        "ranks send their sums twice",
        RANKS,
        "            reduce_scatter(part, flat, self.group)\n            first",
        "            reduce_scatter(part, flat, self.group)\n"
        "            reduce_scatter(part, flat, self.group)\n            first",
        (BYTES_SENT,),
    ),
    Mutant(
        "a plan's shards hold the whole optimizer",
        SHARDING,
        'for name in ("sums", "gradients", "optimizer", "temporaries of the update"):',
        'for name in ("sums", "gradients", "temporaries of the update"):',
        (f"{SENT}::test_the_planned_bytes_are_held",),
    ),
    Mutant(
        "a plan's public rows are in every pass",
        ESTIMATE,
        "again = repeats - 1 if self.setting.public_rows else repeats",
        "again = repeats",
        (f"{ESTIMATES}::test_public_rows_are_in_one_pass",),
    ),
    Mutant(
        "a plan leaves the norms and sums out of the time",
        ESTIMATE,
        'seconds["compute" if by_flops > by_bytes else "memory"] += spent',
        'seconds["compute" if by_flops > by_bytes else "memory"] += 0.0 if call.kind.split(",")[0] in OPS else spent',
        (f"{TRACES}::test_the_ratio_of_times_is_that_of_products",),
    ),
    Mutant(
        "a plan's autocast leaves products in float32",
        FUNCTIONS,
        "args, kwargs = self._cast(half, args, kwargs)",
        "pass",
        (f"{TRACES}::test_calls_are_those_of_the_real_step",),
    ),
    Mutant(
        "a plan's secure noise is the fast one",
        STEPS,
        'noise=Noise(mode="secure") if secure else Noise(seed=0),',
        "noise=Noise(seed=0),",
        (f"{ESTIMATES}::test_secure_noise_makes_all_gradients",),
    ),
    Mutant(
        "a plan's convolutions copy nothing",
        TRACE,
        "self._note(_copies(func, args, out))",
        "self._note()",
        (f"{TRACES}::test_memory_is_that_of_the_real_step",),
    ),
    Mutant(
        "a plan's step is compiled, and nothing is said",
        "adamix/cli_plan.py",
        "    if arguments.compile:\n",
        "    if False:\n",
        (f"{ESTIMATES}::test_the_command_refuses",),
    ),
]
