"""Planted bugs of the ledger: what is spent and not counted, or counted too late."""

from __future__ import annotations

from mutant import Mutant

LEDGER = "adamix/ledger.py"
RECORDS = "adamix/ledger_records.py"
LOCKS = "adamix/locks.py"
DURABLE = "adamix/durable.py"
PHASE = "adamix/private_phase.py"
PRIVACY = "adamix/privacy.py"

LEDGER_TESTS = "tests/faults/test_ledger.py"
ORDER_OF_CALLS = f"{LEDGER_TESTS}::test_a_charge_is_on_the_disk_and_counted_before_it_returns"
DAMAGE = "tests/faults/test_damage.py"
RESUME = "tests/faults/test_resume.py"
CHARGED_FIRST = f"{RESUME}::test_every_step_is_charged_before_batch_and_noise"

_WRITTEN = "                durable.write_all(self._descriptor, line)\n                durable.sync(self._descriptor)\n"
_COUNTED = (
    "                self._hashes.append(durable.unseal(line)[1])\n"
    "                self._size += len(line)\n"
    "                self._write_head()\n"
)
_SHOWN = (
    "        if on_private is not None:\n"
    "            on_private(private_metrics(number, model, private, thresholds, basis))\n"
)
_RELEASED = (
    "        released = mechanism.release(model, mechanism.sample(private, config.sample_rate), thresholds, basis)\n"
)

LEDGER_MUTANTS = [
    Mutant(
        "a run that was cut off spends what nobody kept for it",
        LEDGER,
        "                self.resume_run(run, found.planned - found.charged)\n",
        "                pass\n",
        (f"{LEDGER_TESTS}::test_a_run_that_was_cut_off_goes_on_if_others_have_left_room",),
    ),
    Mutant(
        "two threads are told of the same room",
        LEDGER,
        "        with self._mutex:  # two threads",
        "        if True:  # two threads",
        (f"{LEDGER_TESTS}::test_threads_cannot_use_the_same_room",),
    ),
    Mutant(
        "a line that cannot be written counts",
        LEDGER,
        "                line = durable.seal(record)  # before it counts: what cannot be written must not\n"
        "                self.book.apply(record)\n",
        "                self.book.apply(record)\n                line = durable.seal(record)\n",
        (f"{LEDGER_TESTS}::test_what_cannot_be_written_leaves_nothing",),
    ),
    Mutant(
        "a step is charged after its noise",
        PHASE,
        f"        charge()\n{_SHOWN}{_RELEASED}",
        f"{_SHOWN}{_RELEASED}        charge()\n",
        (CHARGED_FIRST,),
    ),
    Mutant(
        "a step is charged between its batch and its noise",
        PHASE,
        f"        charge()\n{_SHOWN}{_RELEASED}",
        "        batch = mechanism.sample(private, config.sample_rate)\n        charge()\n"
        + _SHOWN
        + "        released = mechanism.release(model, batch, thresholds, basis)\n",
        (CHARGED_FIRST,),
    ),
    Mutant(
        "a charge is not waited for",
        LEDGER,
        _WRITTEN + _COUNTED,
        _WRITTEN.splitlines(keepends=True)[0] + _COUNTED,
        (ORDER_OF_CALLS,),
    ),
    Mutant(
        "the head file does not count a charge",
        LEDGER,
        "len(line)\n                self._write_head()\n",
        "len(line)\n",
        (ORDER_OF_CALLS,),
    ),
    Mutant(
        "the head file counts a line before it is written",
        LEDGER,
        _WRITTEN + _COUNTED,
        _COUNTED + _WRITTEN,
        (ORDER_OF_CALLS,),
    ),
    Mutant(
        "a file gets its name before its bytes are on the disk",
        DURABLE,
        "            write_all(descriptor, data)\n            _os.fsync(descriptor)\n        finally",
        "            write_all(descriptor, data)\n        finally",
        (ORDER_OF_CALLS,),
    ),
    Mutant("a new name is not on the disk", DURABLE, "    sync_folder(new.parent)\n", "", (ORDER_OF_CALLS,)),
    Mutant(
        "a short write is taken for a whole one",
        DURABLE,
        "    while data:\n",
        "    if data:\n",
        ("tests/faults/test_bad_disk.py::test_writes_that_take_seven_bytes_each",),
    ),
    Mutant(
        "the head file is not compared",
        RECORDS,
        "if count < 1 or hashes[count - 1] != last or len(hashes) > count + (not tail):",
        "if False:",
        (f"{DAMAGE}::test_a_ledger_and_a_head_file_of_different_moments_are_refused",),
    ),
    Mutant(
        "lines lost at the end are not missed",
        RECORDS,
        "    if len(hashes) < max(count, 1):\n",
        "    if hashes and len(hashes) < count:\n        count, last = len(hashes), hashes[-1]\n    if not hashes:\n",
        (f"{DAMAGE}::test_lines_cannot_be_lost_repeated_or_moved",),
    ),
    Mutant(
        "a line need not follow the one before",
        RECORDS,
        'record["number"] != number or record["previous"] != hashes[-1]',
        'record["number"] != number',
        (f"{DAMAGE}::test_a_line_sealed_anew_does_not_fit_the_chain",),
    ),
    Mutant(
        "checksums are not compared",
        DURABLE,
        """    if rest != digest.encode() + b'"}\\n':""",
        "    if False:",
        (f"{DAMAGE}::test_some_damage_is_found",),
    ),
    Mutant(
        "the last line does not count until the head file does",
        RECORDS,
        "    return Content(book, hashes, len(content) - len(tail), len(hashes) > count, bool(tail))",
        "    if len(hashes) > count:\n"
        '        return verify(path, b"".join(line + b"\\n" for line in lines[:count]), head)._replace(torn=True)\n'
        "    return Content(book, hashes, len(content) - len(tail), len(hashes) > count, bool(tail))",
        (f"{DAMAGE}::test_a_line_after_the_last_counted_one_counts_and_a_torn_one_does_not",),
    ),
    Mutant(
        "a torn line stays and the next one is joined to it",
        LEDGER,
        "            if content.torn:\n",
        "            if False:\n",
        (f"{DAMAGE}::test_a_line_after_the_last_counted_one_counts_and_a_torn_one_does_not",),
    ),
    Mutant(
        "a lost ledger is replaced by an empty one",
        LEDGER,
        "            if head is not None and head[0] > 1:\n",
        "            if False:\n",
        (f"{LEDGER_TESTS}::test_missing_and_existing_files",),
    ),
    Mutant(
        "writing goes on after a failure",
        LEDGER,
        "            self._failed = True  #",
        "            self._failed = False  #",
        (f"{LEDGER_TESTS}::test_after_a_failed_write_only_a_new_opening_helps",),
    ),
    Mutant(
        "a ledger that was replaced is written to",
        LEDGER,
        "        if (own.st_ino, own.st_dev, own.st_size) != (named.st_ino, named.st_dev, self._size):\n",
        "        if False:\n",
        (f"{LEDGER_TESTS}::test_a_ledger_replaced_or_changed_while_in_use_is_refused",),
    ),
    Mutant(
        "the lock is not taken",
        LOCKS,
        "        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "",
        (f"{LEDGER_TESTS}::test_one_process_at_a_time",),
    ),
    Mutant(
        "a shared lock",
        LOCKS,
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        (f"{LEDGER_TESTS}::test_one_process_at_a_time",),
    ),
    Mutant(
        "a fork may spend",
        LEDGER,
        "        if self._process != os.getpid():\n",
        "        if False:\n",
        (f"{LEDGER_TESTS}::test_a_fork_cannot_spend",),
    ),
    Mutant(
        "a run may take more steps than were checked",
        LEDGER,
        "            if charged > found.planned:\n",
        "            found.planned = max(charged, found.planned)\n            if False:\n",
        (f"{LEDGER_TESTS}::test_a_run_cannot_take_more_than_it_planned",),
    ),
    Mutant(
        "what runs beside it plan is not reserved",
        RECORDS,
        "r.cost(r.planned if r.id in reserved and not r.ended else None)",
        "r.cost()",
        (f"{LEDGER_TESTS}::test_runs_of_one_process_reserve_what_they_plan",),
    ),
    Mutant(
        "the budget is that of each run alone",
        RECORDS,
        "return spent_together([*others, (noise, rate, charged + count)], delta=self.delta)",
        "return spent_together([(noise, rate, charged + count)], delta=self.delta)",
        (f"{RESUME}::test_runs_compose_and_the_budget_refuses_before_anything_is_trained",),
    ),
    Mutant(
        "what was spent is that of the dearest run",
        RECORDS,
        "return spent_together(costs, delta=self.delta if delta is None else delta)",
        "return max((spent_together([c], delta=delta or self.delta) for c in costs), default=0.0)",
        (f"{LEDGER_TESTS}::test_runs_add_up",),
    ),
    Mutant(
        "runs are not composed",
        PRIVACY,
        "return math.hypot(*(math.sqrt(count) / noise for noise, _, count in runs))",
        "return max((math.sqrt(count) / noise for noise, _, count in runs), default=0.0)",
        (f"{LEDGER_TESTS}::test_composition",),
    ),
    Mutant(
        "full batches are left out beside Poisson ones",
        PRIVACY,
        "if mu else []",
        "if False else []",
        (f"{LEDGER_TESTS}::test_composition",),
    ),
]
