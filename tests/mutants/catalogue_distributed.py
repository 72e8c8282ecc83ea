"""Planted bugs of several ranks: noise that is not drawn once, sums of some ranks only, steps that are not the same."""

from __future__ import annotations

from mutant import Mutant

RANKS = "adamix_kernels/nn/ranks.py"
SHARDED = "adamix_kernels/nn/sharded.py"
AGREEMENT = "adamix_kernels/nn/agreement.py"
SUMS = "adamix_kernels/nn/sums.py"
NOISE = "adamix_kernels/ops/noise.py"
SAMPLER = "adamix_kernels/nn/sampler.py"

_RANKS = "tests/distributed/test_ranks.py"
SAME_NOISE = f"{_RANKS}::test_noise_is_drawn_once"
SAME_WEIGHTS = f"{_RANKS}::test_weights_are_those_of_one_process"
REFUSED = f"{_RANKS}::test_refused_on_all_ranks"
SAME_PASSES = f"{_RANKS}::test_refused_where_ranks_do_not_do_the_same"
RANK_SAMPLES = "tests/nn/test_sampler.py"

_FIRST = "first = min(self.rank * width, count)"
_SHARD_OFFSET = "offsets.append(base + self._rows(name)[0] * shape[1:].numel())"
_TAKEN = "taken = taken[taken % self.world_size == self.rank]"

DISTRIBUTED_MUTANTS = [
    Mutant("every rank draws the same part", RANKS, _FIRST, "first = 0", (SAME_NOISE,)),
    Mutant(
        "each rank adds its own noise to all",
        SUMS,
        "            parts, offsets = engine.ranks.reduce(sums)\n",
        "            add_gaussian_noise_(sums, std, engine.noise)\n"
        "            parts, offsets = engine.ranks.reduce(sums)\n",
        (SAME_NOISE,),
    ),
    Mutant(
        "sums are divided by the number of ranks",
        RANKS,
        "    run(out, flat, group=group)\n",
        "    run(out, flat, group=group)\n    out.copy_(out / dist.get_world_size(group))\n",
        (SAME_WEIGHTS,),
    ),
    Mutant(
        "shards draw from where the parameter begins", SHARDED, _SHARD_OFFSET, "offsets.append(base)", (SAME_NOISE,)
    ),
    Mutant(
        "shards of a parameter overlap in the draw",
        SHARDED,
        _SHARD_OFFSET,
        "offsets.append(base + self._rows(name)[0])",
        (SAME_NOISE,),
    ),
    Mutant(
        "buckets draw from the start",
        RANKS,
        "            base += count\n",
        "",
        (f"{_RANKS}::test_buckets_change_nothing",),
    ),
    Mutant(
        "a rank without a sample skips its noise",
        SUMS,
        "elif engine.noise_multiplier and parts:",
        "elif engine.noise_multiplier and parts and (self.totals or engine.ranks is None):",
        (SAME_NOISE,),
    ),
    Mutant(
        "the last rank has no noise on its part",
        RANKS,
        "parts.append(part[: min(width, count - first)])",
        "parts.append(part[: min(width, count - first) * (self.rank < self.size - 1)])",
        (SAME_NOISE,),
    ),
    Mutant(
        "each rank has a key of its own",
        RANKS,
        "return noise if self.rank == 0 else Noise._at(*known[0])",
        "return noise",
        (f"{_RANKS}::test_all_ranks_have_one_key",),
    ),
    Mutant(
        "noise of this rank's threshold, not the largest",
        AGREEMENT,
        "return max(limits)",
        "return limit",
        (f"{_RANKS}::test_noise_follows_the_largest_threshold",),
    ),
    Mutant(
        "ranks may be at other draws", AGREEMENT, '"noise: draws": engine.noise._draws', '"noise: draws": 0', (REFUSED,)
    ),
    Mutant(
        "rows of integer sums are counted by rank",
        AGREEMENT,
        "grid.join(sum(int(x) for x in rows),",
        "grid.join(max(int(x) for x in rows),",
        (REFUSED,),
    ),
    Mutant(
        "a user may be on several ranks",
        AGREEMENT,
        "ranks.check_disjoint(sums.users.seen)",
        "pass",
        (REFUSED,),
    ),
    Mutant(
        "tensors may share noise",
        NOISE,
        "if any(end > start for",
        "if any(end > start + 2**62 for",
        ("tests/kernels/test_noise.py",),
    ),
    Mutant("a sample is on every rank", SAMPLER, _TAKEN, "taken = taken", (RANK_SAMPLES,)),
    Mutant(
        "ranks share the coins of their samples",
        SAMPLER,
        _TAKEN,
        "taken = taken[taken < -(-self.num_samples // self.world_size)] * self.world_size + self.rank",
        (RANK_SAMPLES,),
    ),
    Mutant(
        "ranks take numbers from elsewhere",
        RANKS,
        "            if other != found[0][0]:\n",
        "            if other != found[0][0] and place == PLACES[1]:\n",
        (SAME_PASSES,),
    ),
    Mutant(
        "sums of shards are sent without a plan",
        SHARDED,
        'if len(set(self.meet("a backward pass", float(plan)))) > 1:',
        'if len(self.meet("a backward pass", float(plan))) > self.size:',
        (SAME_PASSES,),
    ),
    Mutant(
        "weights of an evaluation are used after the step",
        "adamix_kernels/nn/engine.py",
        "                self.shards.rest()\n",
        "                pass\n",
        (f"{_RANKS}::test_an_evaluation_changes_nothing",),
    ),
    Mutant(
        "ranks go on when rank 0 could not charge",
        "adamix/parts.py",
        "    if known[1] is not None:\n",
        "    if known[1] is not None and dist.get_rank(group) == 0:\n",
        (f"{_RANKS}::test_one_ledger_stops_all_ranks",),
    ),
]
