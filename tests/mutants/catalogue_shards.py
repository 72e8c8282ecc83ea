"""Planted bugs of `DeepAdaMix` over ranks: what is charged when, whose weights are trained, which checkpoint counts."""

from __future__ import annotations

from mutant import Mutant

RANKS = "adamix/deep/ranks.py"
SHARDING = "adamix/deep/sharding.py"
PARTS = "adamix/parts.py"
COMMAND = "adamix/cli_finetune.py"

SHARDS = "tests/deep/test_deep_shards.py"
JOBS = "tests/deep/test_deep_ranks.py"
ORDER = f"{SHARDS}::test_a_step_is_charged_before_batch_and_noise_on_each_rank"
DIGEST = f"{SHARDS}::test_a_digest_is_that_of_the_whole"
UNEQUAL = f"{SHARDS}::test_ranks_that_were_given_other_things_are_refused"
REFUSED = f"{SHARDS}::test_refused_on_all_ranks"

SHARD_MUTANTS = [
    Mutant("ranks take a step before it is charged", RANKS, 'self._call("charge")', "pass", (ORDER,)),
    Mutant(
        "the first checkpoint of shards comes after the run's line",
        RANKS,
        '        self._write(training)\n        self._call("start")\n',
        '        self._call("start")\n        self._write(training)\n',
        (ORDER,),
    ),
    Mutant(
        "a checkpoint of shards is of the step before",
        RANKS,
        "parts.save(self._parts, due, len(self.steps), training, self._anchor)",
        "parts.save(self._parts, due, max(0, len(self.steps) - 1), training, self._anchor)",
        (f"{SHARDS}::test_a_run_goes_on_with_other_ranks",),
    ),
    Mutant(
        "replicas of shards train their own weights",
        SHARDING,
        "elif x.device_mesh.ndim == 2:",
        "elif x.device_mesh.ndim == 3:",
        (f"{SHARDS}::test_ranks_train_the_weights_of_the_first",),
    ),
    Mutant(
        "frozen rows of a resumed run may change places",
        SHARDING,
        'salt=number.to_bytes(8, "little"), ',
        "",
        (DIGEST,),
    ),
    Mutant(
        "replicas count twice in a digest",
        SHARDING,
        "if mesh.ndim == 2 and mesh.get_local_rank(0):",
        "if mesh.ndim == 3:",
        (DIGEST,),
    ),
    Mutant(
        "damaged parts of a checkpoint are taken",
        PARTS,
        "if found.get(name) != checksum:",
        "if name not in found:",
        (REFUSED,),
    ),
    Mutant(
        "a pickle that somebody changed is read",
        PARTS,
        'or record["metadata_sha256"] != _digest(metadata):',
        "or not record:",
        ("tests/distributed/test_ranks.py::test_a_damaged_checkpoint_is_refused",),
    ),
    Mutant(
        "a row that fills a pass counts",
        "adamix/deep/phases.py",
        "else losses * bool(batch.count))",
        "else losses)",
        (f"{SHARDS}::test_a_run_is_that_of_one_process",),
    ),
    Mutant(
        "a job that is started again without a checkpoint begins anew",
        COMMAND,
        "    if arguments.checkpoint is None:\n",
        "    if arguments.recipe is None:\n",
        (f"{JOBS}::test_restarts_without_a_checkpoint_are_refused",),
    ),
    Mutant(
        "a job that is started again does not go on",
        COMMAND,
        "arguments.resume |= holds_a_run(arguments.checkpoint)",
        "arguments.resume |= False",
        (f"{JOBS}::test_torchrun_goes_on_after_a_rank_was_killed",),
    ),
    Mutant(
        "a row is public on one rank and private on another",
        "adamix/deep/trainer.py",
        "ranks.check_equal(rows, told=False)",
        "ranks.check_equal({}, told=False)",
        (UNEQUAL,),
    ),
    Mutant(
        "ranks have other settings",
        RANKS,
        "if first != own:",
        "if first != own and not told:",
        (UNEQUAL,),
    ),
    Mutant(
        "a hash of private rows is in a message",
        RANKS,
        "if told else",
        "if True else",
        (UNEQUAL,),
    ),
    Mutant(
        "a checkpoint without the parts of another machine is sealed",
        PARTS,
        "if unread := written - files.keys():",
        "if unread := files.keys() - files.keys():",
        (f"{SHARDS}::test_all_ranks_write_where_the_first_does",),
    ),
    Mutant(
        "a job that is started again takes any ledger, without the budget that was asked for",
        COMMAND,
        "if new_ledger_was_made(arguments):",
        "if arguments.new_ledger is not None and Path(arguments.ledger).exists():",
        (f"{JOBS}::test_a_restarted_job_does_not_take_a_ledger_that_was_refused_at_first",),
    ),
]
