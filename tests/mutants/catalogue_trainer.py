"""Planted bugs of the deep trainer."""

from __future__ import annotations

from mutant import Mutant

PHASES = "adamix/deep/phases.py"
TRAINER = "adamix/deep/trainer.py"
DATA = "adamix/deep/data.py"
LOSSES = "adamix/deep/losses.py"

RUNS = "tests/deep/test_deep_runs.py"
STEPS = "tests/deep/test_deep_trainer.py"
ROWS = "tests/deep/test_rows_of_datasets.py"

DEEP_TRAINER_MUTANTS = [
    Mutant(
        "the deep trainer draws its batch before it is charged",
        PHASES,
        "        charge()\n        chosen = [] if sampler is None else sampler.draw()\n",
        "        chosen = [] if sampler is None else sampler.draw()\n        charge()\n",
        (f"{RUNS}::test_every_step_is_charged_before_batch_and_noise",),
    ),
    Mutant(
        "private rows pass for public ones",
        PHASES,
        "slice(0, batch.public), weight)",
        "slice(0, batch.count), weight)",
        (f"{STEPS}::test_one_row_moves_a_step_by_the_threshold_at_most",),
    ),
    Mutant(
        "rows that fill a batch count",
        PHASES,
        "losses[: batch.count].sum()",
        "losses.sum()",
        (f"{STEPS}::test_a_step_is_the_clipped_sum_and_the_public_one",),
    ),
    Mutant(
        "batches are as long as what was drawn",
        PHASES,
        "(size - len(rows) if task.by_row else not rows)",
        "0",
        (f"{RUNS}::test_every_pass_has_as_many_rows_whatever_was_drawn",),
    ),
    Mutant(
        "the engine divides a sum by the rows of the batch",
        PHASES,
        'loss_reduction="sum"',
        'loss_reduction="mean"',
        (f"{STEPS}::test_a_step_is_the_clipped_sum_and_the_public_one",),
    ),
    Mutant(
        "the deep trainer calibrates noise and adds less",
        TRAINER,
        "config, recorder.noise_multiplier, noise)",
        "config, 0.5 * recorder.noise_multiplier, noise)",
        (f"{STEPS}::test_noise_has_the_size_that_was_accounted_for",),
    ),
    Mutant(
        "a resumed deep run draws the noise of the one before",
        TRAINER,
        "noise = Noise(config.noise_seed, config.noise_mode)",
        "noise = Noise(0)",
        (f"{RUNS}::test_a_resumed_run_is_charged_for_what_was_lost_and_shares_no_noise",),
    ),
    Mutant(
        "public and private rows of datasets may overlap",
        TRAINER,
        '    check_no_overlap(digests["public"], digests["private"])\n',
        "",
        (f"{STEPS}::test_what_is_wrong_is_named",),
    ),
    Mutant(
        "loading private rows moves the generators",
        DATA,
        "            random.setstate(python)\n",
        "            pass\n",
        (
            f"{ROWS}::test_generators_are_secret_within_and_kept",
            f"{RUNS}::test_nothing_returned_has_touched_a_private_row",
        ),
    ),
    Mutant(
        "private rows stay in a buffer",
        PHASES,
        "        if found := before.changed(traces_of(task.model)):\n",
        "        if found := '':\n",
        (f"{STEPS}::test_what_is_wrong_is_named",),
    ),
    Mutant(
        "a loss may mix the rows of a batch",
        LOSSES,
        "    expected = by_row if whole.dim() else by_row.sum()\n",
        "    expected = whole\n",
        (f"{STEPS}::test_what_is_wrong_is_named",),
    ),
    Mutant(
        "a mean over one public row passes for a sum",
        TRAINER,
        "rows = rows * 2 if len(rows) == 1 else rows",
        "rows = list(rows)",
        (f"{STEPS}::test_what_is_wrong_is_named",),
    ),
    Mutant(
        "one row alone is loaded twice",
        DATA,
        "if i < _LOADED_TWICE and own is None",
        "if i < 1 and own is None",
        (f"{STEPS}::test_a_changing_row_cannot_be_compared",),
    ),
    Mutant(
        "compiled batches may be as long as the draw",
        TRAINER,
        "if (config.compile or is_compiled(self.model)) and not by_row:",
        "if False:",
        (f"{STEPS}::test_what_is_wrong_is_named",),
    ),
]
