"""Planted bugs of captured passes."""

from __future__ import annotations

from mutant import Mutant

GRAPHED = "adamix_kernels/nn/graphed.py"
SUMS = "adamix_kernels/nn/sums.py"
PASSES = "adamix_kernels/nn/passes.py"

TESTS = "tests/nn/test_graphed.py"
REPLAYS = f"{TESTS}::test_replays_are_ordinary_passes[book_keeping-flat]"

_COPIES = "copies = torch._foreach_mul(list(captured.totals.values()), ratio)"
_RATIO = "ratio = captured._divisor / self._divisor"

GRAPHED_MUTANTS = [
    Mutant(
        "the sums of a capture count",
        GRAPHED,
        "            engine._sums, engine._max_grad_norm = sums, limit\n",
        "            engine._max_grad_norm = limit\n",
        (REPLAYS,),
    ),
    Mutant(
        "replays clip by the threshold of the capture",
        GRAPHED,
        "            self._set_limit(sums.threshold.whole)\n",
        "",
        (f"{TESTS}::test_no_sample_of_a_replay_adds_more_than_the_threshold[book_keeping]", REPLAYS),
    ),
    Mutant(
        "a replay counts twice",
        GRAPHED,
        "            sums.take(self._left)\n",
        "            sums.take(self._left)\n            sums.take(self._left)\n",
        (f"{TESTS}::test_no_sample_of_a_replay_adds_more_than_the_threshold[book_keeping]", REPLAYS),
    ),
    Mutant(
        "a step's sums are the memory that the next replay writes over",
        SUMS,
        _COPIES,
        "copies = list(captured.totals.values())",
        (REPLAYS,),
    ),
    Mutant(
        "a replay is divided by the batch size of the capture",
        SUMS,
        _RATIO,
        "ratio = 1.0",
        (f"{TESTS}::test_the_expected_batch_size_of_now_divides",),
    ),
    Mutant(
        "a graph is replayed with other settings",
        GRAPHED,
        "        if changed:\n            raise",
        "        if False:\n            raise",
        (f"{TESTS}::test_what_a_graph_does_not_see_is_refused[frozen]",),
    ),
    Mutant(
        "a graph runs where another is captured",
        GRAPHED,
        "            capturing()\n        ),",
        "            False\n        ),",
        (f"{TESTS}::test_a_call_within_another_capture_is_refused",),
    ),
    Mutant(
        "public samples may be part of a capture",
        PASSES,
        "        if Passes._recording is not None:\n            raise",
        "        if False:\n            raise",
        (f"{TESTS}::test_a_loss_that_cannot_be_captured",),
    ),
]
