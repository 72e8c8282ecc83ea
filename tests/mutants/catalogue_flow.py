"""Planted bugs of privacy by user, and of what may leave a run without noise."""

from __future__ import annotations

from mutant import Mutant

ENGINE_USERS = "adamix_kernels/nn/users.py"
CLIPPED = "adamix_kernels/nn/clipped.py"
PRIVATE = "adamix_kernels/private.py"
STEP_METRICS = "adamix_kernels/nn/metrics.py"
MECHANISM = "adamix/mechanism.py"
USERS = "adamix/users.py"
PHASE = "adamix/private_phase.py"
METRICS = "adamix/private_metrics.py"
REPORT = "adamix/report.py"
COMMANDS = "adamix/cli.py"

ENGINE_USER_TESTS = "tests/nn/test_users.py"
USER_TESTS = "tests/trainer/test_user_rows.py"
PRIVATE_TESTS = "tests/nn/test_private.py"
FLOW = "tests/trainer/test_information_flow.py"

USER_MUTANTS = [
    Mutant(
        "users are told apart by the lower half of their number",
        ENGINE_USERS,
        'found.detach().to("cpu", torch.int64, copy=True)',
        'found.detach().to("cpu", torch.int32).long()',
        (f"{ENGINE_USER_TESTS}::test_ids_are_compared_whole",),
    ),
    Mutant(
        "the engine clips a user's rows one by one",
        CLIPPED,
        "        parts = sums.users.summed(parts)\n",
        "        pass\n",
        (f"{ENGINE_USER_TESTS}::test_a_user_of_many_rows_adds_at_most_the_threshold",),
    ),
    Mutant(
        "a user may be in two backward passes of a step",
        ENGINE_USERS,
        "        if again:\n",
        "        if False:\n",
        (f"{ENGINE_USER_TESTS}::test_a_user_in_two_backward_passes_of_a_step_is_refused",),
    ),
    Mutant(
        "users of the pass before are those of this one",
        ENGINE_USERS,
        "            self._ids = outer\n",
        "            pass\n",
        (f"{ENGINE_USER_TESTS}::test_rows_without_users_are_refused",),
    ),
    Mutant(
        "ids may be changed by the caller",
        ENGINE_USERS,
        "copy=True)",
        "copy=False)",
        (f"{ENGINE_USER_TESTS}::test_ids_that_are_changed_later_do_not_matter",),
    ),
    Mutant(
        "the trainer clips a user's rows one by one",
        MECHANISM,
        "return summed_by_user(chunks, ordered.users) if isinstance(ordered, UserRows) else chunks",
        "return chunks",
        (f"{USER_TESTS}::test_a_user_adds_at_most_the_threshold",),
    ),
    Mutant(
        "users of a softmax head take the fast path of rows",
        MECHANISM,
        "isinstance(model, SoftmaxHead) and basis is None and not isinstance(rows, UserRows)",
        "isinstance(model, SoftmaxHead) and basis is None",
        (f"{USER_TESTS}::test_a_release_is_the_sum_of_clipped_user_sums",),
    ),
    Mutant(
        "users are sampled by row",
        USERS,
        "chosen = (uniform < sample_rate)[index]",
        "chosen = uniform.new_empty(len(index)).uniform_() < sample_rate",
        (f"{USER_TESTS}::test_users_are_sampled_and_not_rows",),
    ),
    Mutant(
        "rows of a user are not brought together",
        USERS,
        "    order = rows.users.argsort(stable=True)\n",
        "    order = slice(None)\n",
        (f"{USER_TESTS}::test_rows_of_a_user_side_by_side",),
    ),
    Mutant(
        "a user in two chunks is clipped twice",
        USERS,
        "if kept is not None and int(found[0]) == last:",
        "if False:",
        (f"{USER_TESTS}::test_a_user_may_lie_in_several_chunks", f"{USER_TESTS}::test_sums_of_chunks"),
    ),
]

FLOW_MUTANTS = [
    Mutant(
        "private metrics are written by default",
        COMMANDS,
        "private_metrics=seen.append if arguments.log_private_metrics else None,",
        "private_metrics=seen.append,",
        (f"{FLOW}::test_the_command_line_writes_them_where_asked",),
    ),
    Mutant(
        "a private value shows itself",
        PRIVATE,
        'return f"<private {self.name}, outside the guarantee; call reveal()>"',
        'return f"<private {self.name}: {self._compute()}>"',
        (f"{PRIVATE_TESTS}::test_only_repr_shows_and_not_the_value",),
    ),
    Mutant(
        "a private value is a number without being revealed",
        PRIVATE,
        '    setattr(Private, f"__{_name}__", _refuse(_what))\n',
        '    setattr(Private, f"__{_name}__", _refuse(_what))\nPrivate.__float__ = lambda self: self._compute()\n',
        (f"{PRIVATE_TESTS}::test_every_other_way_is_refused",),
    ),
    Mutant(
        "a private value may be compared, to stop early for instance",
        PRIVATE,
        '    setattr(Private, f"__{_name}__", _refuse(_what))\n',
        '    setattr(Private, f"__{_name}__", _refuse(_what))\n'
        "Private.__lt__ = lambda self, other: self._compute() < other\n",
        (f"{PRIVATE_TESTS}::test_every_other_way_is_refused",),
    ),
    Mutant(
        "attributes of a private value are those of what it holds",
        PRIVATE,
        '        raise AttributeError(refusal(self.name, f"its attribute {attribute!r} cannot be read"))\n',
        "        return getattr(self._compute(), attribute)\n",
        (f"{PRIVATE_TESTS}::test_every_other_way_is_refused",),
    ),
    Mutant(
        "a private value is revealed without a warning",
        PRIVATE,
        "        warnings.warn(\n",
        "        (lambda *_, **__: None)(\n",
        (f"{PRIVATE_TESTS}::test_reveal_warns_and_gives_the_value",),
    ),
    Mutant(
        "the engine's clipped fraction is a float",
        STEP_METRICS,
        'return Private("clipped_fraction", self._clipped_fraction)',
        "return self._clipped_fraction()",
        (f"{PRIVATE_TESTS}::test_metrics_of_the_engine_are_private",),
    ),
    Mutant(
        "the engine tells how many samples took part",
        STEP_METRICS,
        'return Private("samples", lambda: len(self._norms))',
        "return len(self._norms)",
        (f"{PRIVATE_TESTS}::test_metrics_of_the_engine_are_private",),
    ),
    Mutant(
        "private metrics of a run are floats",
        METRICS,
        'return Private(name, lambda: total / count if count else float("nan"))',
        'return total / count if count else float("nan")',
        (f"{FLOW}::test_private_metrics_are_marked",),
    ),
    Mutant(
        "JSON reveals private values",
        REPORT,
        '            item.refuse("it cannot be written as JSON")\n',
        "            return finite(item.reveal())\n",
        (f"{FLOW}::test_private_metrics_are_marked",),
    ),
    Mutant(
        "private metrics are written among the public ones",
        REPORT,
        '            (staging / "PRIVATE_metrics.jsonl").write_text("".join(lines))\n',
        '            (staging / "metrics.jsonl").write_text("".join(lines))\n',
        (f"{FLOW}::test_they_go_to_a_file_of_their_own",),
    ),
    Mutant(
        "the summary tells how many private rows there are",
        COMMANDS,
        '"steps": len(result.steps),\n',
        '"steps": len(result.steps),\n        "private_rows": len(split.private.y),\n',
        (f"{FLOW}::test_nothing_written_has_touched_a_private_row",),
    ),
    Mutant(
        "a step tells the loss of private rows",
        PHASE,
        "            float(loss) / len(public.y),\n",
        "            float(model.grad_sum(private)[2]) / max(1, len(private.y)),\n",
        (f"{FLOW}::test_nothing_returned_has_touched_a_private_row",),
    ),
    Mutant(
        "a step tells the clipped share of private rows",
        PHASE,
        "            float((norm_sq.sqrt() > thresholds[:, None]).any(0).double().mean()),\n",
        "            float((public_norms(model.grad_sum(private)[1], config).sqrt() > thresholds[:, None]).sum()),\n",
        (f"{FLOW}::test_nothing_returned_has_touched_a_private_row",),
    ),
    Mutant(
        "the run stops early by the loss of private rows",
        PHASE,
        "        charge()\n",
        "        if number > 1 and float(model.grad_sum(private)[2]) / max(1, len(private.y)) > 3.0:\n"
        "            return\n"
        "        charge()\n",
        (f"{FLOW}::test_nothing_returned_has_touched_a_private_row",),
    ),
]
