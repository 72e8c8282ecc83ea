"""Planted bugs of checkpoints, and of what a run asks the ledger before it begins or goes on."""

from __future__ import annotations

from mutant import Mutant

LEDGER = "adamix/ledger.py"
RECORDS = "adamix/ledger_records.py"
CHECKPOINT = "adamix/checkpoint.py"
RECORDER = "adamix/recorder.py"
TRAINER = "adamix/trainer.py"

DAMAGE = "tests/faults/test_damage.py"
RESUME = "tests/faults/test_resume.py"
REFUSED = f"{RESUME}::test_what_is_not_the_same_run_is_refused"

_TENSORS = '        durable.replace_file(path.with_suffix(".safetensors"), tensors)\n'
_JSON = "        durable.replace_file(path, durable.seal(record))\n"

RESUME_MUTANTS = [
    Mutant(
        "the budget is not checked before a run",
        RECORDER,
        "                ledger.check(self.noise_multiplier, config.sample_rate, config.steps)\n",
        "                pass\n",
        (f"{RESUME}::test_runs_compose_and_the_budget_refuses_before_anything_is_trained",),
    ),
    Mutant(
        "the budget is not checked when a run is resumed",
        RECORDS,
        "charged = 0 if run is None else self.runs[run].charged",
        "charged = 0",
        (f"{RESUME}::test_a_budget_too_small_for_the_lost_step_names_the_steps_that_fit",),
    ),
    Mutant(
        "a resumed run forgets what the ledger counted",
        RECORDER,
        "            self._charged = run.charged\n",
        "            self._charged = len(self.steps)\n",
        (f"{RESUME}::test_a_resumed_run_is_charged_for_what_was_lost",),
    ),
    Mutant(
        "the interrupted step is not charged again",
        RECORDER,
        "self._charged + 1 if self._ledger is None else",
        "self._charged + 1 if self._ledger is None or self._charged > len(self.steps) else",
        (f"{RESUME}::test_a_resumed_run_is_charged_for_what_was_lost",),
    ),
    Mutant(
        "epsilon of a resumed run counts finished steps",
        RECORDER,
        "steps=self._charged, sample_rate=self.config.sample_rate",
        "steps=len(self.steps), sample_rate=self.config.sample_rate",
        (f"{RESUME}::test_a_resumed_run_is_charged_for_what_was_lost",),
    ),
    Mutant(
        "a resumed run repeats the noise: its key is that of the run",
        TRAINER,
        "Noise(config.noise_seed, config.noise_mode)",
        "Noise._with_key(bytes.fromhex(recorder._run) * 2, config.noise_mode)",
        (f"{RESUME}::test_no_key_is_stored_and_each_process_draws_its_own",),
    ),
    Mutant(
        "the key is in the checkpoint",
        RECORDER,
        "        self.saved: Checkpoint | None = None\n",
        "        self.saved: Checkpoint | None = None\n"
        "        from adamix_kernels import Noise\n\n"
        "        start = Noise._start\n"
        '        Noise._start = lambda s, k, m: (start(s, k, m), fixed.setdefault("key", s._key))[0]\n',
        (f"{RESUME}::test_no_key_is_stored_and_each_process_draws_its_own",),
    ),
    Mutant(
        "noise of one seed for all runs of a ledger",
        RECORDER,
        "    if ledger is not None and config.noise_seed is not None:\n",
        "    if False:\n",
        (REFUSED,),
    ),
    Mutant(
        "a ledger older than the checkpoint is accepted",
        RECORDER,
        "        ledger.require(saved.ledger_count, saved.ledger_head)\n",
        "",
        (f"{RESUME}::test_an_older_or_another_ledger_is_refused",),
    ),
    Mutant(
        "another ledger of the same length is accepted",
        LEDGER,
        "self.count < count or self._hashes[count - 1] != head",
        "self.count < count",
        (f"{RESUME}::test_an_older_or_another_ledger_is_refused",),
    ),
    Mutant(
        "a run goes on with other settings",
        RECORDER,
        "        elif before != now:\n",
        "        elif False:\n",
        (REFUSED,),
    ),
    Mutant(
        "a run goes on with other public rows",
        RECORDER,
        "        if saved.fixed.get(name) != now:\n",
        "        if False:\n",
        (REFUSED,),
    ),
    Mutant(
        "a run goes on with another model",
        RECORDER,
        "for name, tensor in view.module.state_dict().items() if name not in trained]",
        "for name, tensor in view.module.state_dict().items() if False]",
        (f"{RESUME}::test_another_model_is_refused",),
    ),
    Mutant(
        "a new run overwrites the checkpoints of another",
        RECORDER,
        "                check_unused(folder)\n",
        "                pass\n",
        (REFUSED,),
    ),
    Mutant(
        "users are charged in a ledger of records",
        RECORDER,
        "if opened is not None and opened.book.unit != unit:",
        "if False:",
        (f"{RESUME}::test_the_unit_must_be_that_of_the_ledger",),
    ),
    Mutant(
        "a damaged checkpoint is accepted",
        CHECKPOINT,
        '        if hashlib.sha256(data).hexdigest() != record.pop("tensors_sha256"):\n',
        '        if not record.pop("tensors_sha256"):\n',
        (f"{DAMAGE}::test_checkpoints_of_another_make_are_refused", f"{DAMAGE}::test_some_damage_is_found"),
    ),
    Mutant(
        "a checkpoint's JSON comes before its tensors",
        CHECKPOINT,
        _TENSORS + _JSON,
        _JSON + _TENSORS,
        ("tests/faults/test_bad_disk.py", "tests/faults/test_crashes.py"),
    ),
    Mutant("one checkpoint is kept", CHECKPOINT, "_KEPT = 2", "_KEPT = 1", (f"{RESUME}::test_fewer_checkpoints",)),
]
