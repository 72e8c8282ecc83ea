"""Planted bugs of training, each with the checks that must find it, the likeliest first; and the list of all."""

from __future__ import annotations

from catalogue_combos import COMBO_MUTANTS
from catalogue_compile import COMPILE_MUTANTS
from catalogue_distributed import DISTRIBUTED_MUTANTS
from catalogue_flow import FLOW_MUTANTS, USER_MUTANTS
from catalogue_graphed import GRAPHED_MUTANTS
from catalogue_ledger import LEDGER_MUTANTS
from catalogue_mixed import MIXED_MUTANTS
from catalogue_plan import PLAN_MUTANTS
from catalogue_planned import PLANNED_MUTANTS
from catalogue_resume import RESUME_MUTANTS
from catalogue_secure import SECURE_MUTANTS
from catalogue_shards import SHARD_MUTANTS
from catalogue_subspace import SUBSPACE_MUTANTS
from catalogue_trainer import DEEP_TRAINER_MUTANTS
from mutant import Mutant

ENGINE = "adamix_kernels/nn/engine.py"
SUMS = "adamix_kernels/nn/sums.py"
PASSES = "adamix_kernels/nn/passes.py"
ATTACH = "adamix_kernels/nn/attach.py"
CLIPPED = "adamix_kernels/nn/clipped.py"
COMBINE = "adamix_kernels/nn/combine.py"
CLIPPING = "adamix_kernels/nn/clipping.py"
SAMPLER = "adamix_kernels/nn/sampler.py"
NOISE = "adamix_kernels/ops/noise.py"
CLIP = "adamix_kernels/ops/clip.py"
NUMERICS = "adamix_kernels/ops/_numerics.py"
NORM = "adamix_kernels/ops/norm.py"
HEAD = "adamix_kernels/ops/head.py"
NATIVE = "adamix_kernels/native.py"
MECHANISM = "adamix/mechanism.py"
PHASE = "adamix/private_phase.py"
PRIVACY = "adamix/privacy.py"
TRAINER = "adamix/trainer.py"
ROWS = "adamix/rows.py"

AUDIT_CHECKS = "tests/audit/test_audit_runs.py::test_the_checks_hold"
AUDIT_CANARY = "tests/audit/test_audit_runs.py::test_a_canary_adds_the_whole_threshold_and_no_more"
AUDIT_BOUND = "tests/audit/test_audit_runs.py::test_each_strategy_comes_near_the_theory"
AUDIT_TRAINER = "tests/audit/test_audit_runs.py::test_a_canary_of_the_trainer_adds_the_whole_threshold"
STEP = "tests/nn/test_engine.py::test_a_step_is_the_clipped_sum"
SCALE = "tests/nn/test_engine_scale.py"
STEPS = "tests/nn/test_engine_steps.py"
BOUNDS = "tests/kernels/test_bounds.py"
REVIEW = "tests/nn/test_review_privacy.py"
PHASES = "tests/trainer/test_phases.py"
PRIVACY_TESTS = "tests/trainer/test_privacy.py"
MECHANISM_TESTS = "tests/trainer/test_mechanism.py"
TRAINER_TESTS = "tests/trainer/test_trainer.py"
NOISE_TESTS = "tests/kernels/test_noise.py"

_STD = "std = limit * engine.noise_multiplier / engine.expected_batch_size"
_TAKEN = "taken = (self._noise.uniform(self.num_samples) < rate).nonzero().flatten()"
_CHOSEN = "chosen = self.noise.uniform(len(rows.y), rows.x.device) < sample_rate"

NOISE_MUTANTS = [
    Mutant("noise x 0.95", SUMS, _STD, _STD.replace("limit", "0.95 * limit"), (AUDIT_CHECKS,)),
    Mutant("noise of the sum on the mean of means", SUMS, _STD, f"{_STD} ** 2", (AUDIT_CHECKS,)),
    Mutant("noise without the threshold", SUMS, _STD, _STD.replace("limit * ", ""), (AUDIT_CHECKS,)),
    Mutant(
        "noise of the last threshold, not the largest",
        SUMS,
        "limit = functools.reduce(larger, limits)",
        "limit = limits[-1]",
        (f"{STEPS}::test_noise_is_that_of_the_largest_threshold",),
    ),
    Mutant(
        "noise for each micro-batch as well",
        SUMS,
        "            _accumulate(self.totals, name, total)\n",
        "            engine = self._engine\n"
        "            std = float(self.threshold.whole) * engine.noise_multiplier / engine.expected_batch_size\n"
        "            _accumulate(self.totals, name, add_gaussian_noise_(total, std, engine.noise))\n",
        (AUDIT_CHECKS, "tests/nn/test_engine.py::test_micro_batches_change_nothing"),
    ),
    Mutant(
        "no noise where no backward pass was",
        SUMS,
        "elif engine.noise_multiplier and parts:",
        "elif engine.noise_multiplier and self.totals:",
        (f"{STEPS}::test_noise_of_a_step_has_its_standard_deviation",),
    ),
    Mutant(
        "an empty batch is skipped",
        SUMS,
        "elif engine.noise_multiplier and parts:",
        "elif engine.noise_multiplier and any(float(s.abs().sum()) for s in sums):",
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "parameters that were not used get no noise",
        ENGINE,
        "trained = [(name, p) for name, p in self._attached.stepped if p.requires_grad]",
        "used = self._sums.totals\n"
        "            trained = [(name, p) for name, p in self._attached.stepped if p.requires_grad]\n"
        "            trained = [(name, p) for name, p in trained if name in used or not used]",
        (f"{STEPS}::test_noise_reaches_unused_parameters_and_never_repeats",),
    ),
    Mutant("same noise in each step", NOISE, "self._draws += 1", "self._draws = 1", (AUDIT_CHECKS,)),
    Mutant(
        "noise comes again after seven draws",
        NOISE,
        "            return self._draws - 1\n",
        "            return (self._draws - 1) % 7\n",
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "same noise in each parameter",
        NATIVE,
        "waiting.append((flat.data_ptr(), dtype_of(flat.dtype), flat.numel(), offset))",
        "waiting.append((flat.data_ptr(), dtype_of(flat.dtype), flat.numel(), 0))",
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "one key for all: a resumed run repeats the noise",
        NOISE,
        "key = os.urandom(32) if seed is None",
        "key = bytes(32) if seed is None",
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "the key of a resumed run is its step",
        ENGINE,
        'self.steps = int(state["steps"])',
        'self.steps = int(state["steps"])\n        self.noise = Noise(seed=self.steps)',
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "noise may be used after a fork",
        NOISE,
        "if self._this_process() != self._process:",
        "if False:",
        (f"{NOISE_TESTS}::test_a_forked_noise_refuses",),
    ),
    Mutant(
        "tails end where 24 bits do",
        NOISE,
        "return ((high >> 5) << 26) | (low >> 6)",
        "return ((high >> 8) << 29) | (low >> 40)",
        (f"{NOISE_TESTS}::test_the_tail_reaches_beyond_24_bits", NOISE_TESTS),
    ),
    Mutant(
        "compiled noise without the threshold",
        NATIVE,
        "std = noise_multiplier * threshold if noise_multiplier else 0.0",
        "std = noise_multiplier if noise_multiplier else 0.0",
        ("tests/kernels/test_specs.py",),
    ),
    Mutant(
        "layers' noise without the root of their number",
        MECHANISM,
        "(self.noise_multiplier * math.sqrt(len(sums)))",
        "self.noise_multiplier",
        (f"{MECHANISM_TESTS}::test_layers_are_clipped_each_and_noised_for_the_whole",),
    ),
    Mutant(
        "the trainer's noise has a fixed key",
        TRAINER,
        "Noise(config.noise_seed, config.noise_mode)",
        "Noise(config.noise_seed or 0)",
        (AUDIT_CHECKS,),
    ),
]

CLIPPING_MUTANTS = [
    Mutant(
        "norm misses a parameter",
        CLIPPED,
        "norm_sq = [factors.norm_sq() for _, factors in parts]",
        "norm_sq = [factors.norm_sq() for _, factors in parts[1:] or parts]",
        (f"{AUDIT_CANARY}[auto-fast]",),
    ),
    Mutant(
        "clipped by the mean norm of the batch",
        CLIPPED,
        "        total = total_norm_sq(norm_sq)\n",
        "        total = total_norm_sq(norm_sq).mean().expand(parts[0][1].samples)\n",
        (f"{STEP}[sum-auto]", STEP),
    ),
    Mutant(
        "each layer is clipped to the whole threshold",
        CLIPPING,
        "return self.value / math.sqrt(max(1, len(self.layers)))",
        "return self.value",
        (f"{AUDIT_CANARY}[per_layer-fast]",),
    ),
    Mutant(
        "threshold changed in place after the backward pass",
        CLIPPING,
        "value = value.detach().double().abs() + 0.0  # never the tensor itself",
        "value = value.detach()",
        (f"{STEPS}::test_changing_a_threshold_in_place_does_not_shrink_the_noise_of_sums_made_before",),
    ),
    Mutant(
        "factor of loss scaling left out",
        SUMS,
        "return self._engine.loss_scale / (max(samples, 1)",
        "return 1.0 / (max(samples, 1)",
        (f"{SCALE}::test_a_scaled_loss_is_clipped_as_the_loss_itself",),
    ),
    Mutant(
        "a mean is taken for one over the expected batch",
        SUMS,
        "(max(samples, 1) if mean else 1)",
        "(self._engine.expected_batch_size if mean else 1)",
        (f"{SCALE}::test_a_scaled_loss_is_clipped_as_the_loss_itself",),
    ),
    Mutant(
        "sums divided by the realised batch",
        SUMS,
        "return self.scale(samples) * self._divisor",
        "return self.scale(samples) * max(samples, 1)",
        (f"{AUDIT_CANARY}[auto-fast]",),
    ),
    Mutant(
        "a new expected batch size is taken the wrong way round",
        SUMS,
        "torch._foreach_mul_(sums, self._divisor / engine.expected_batch_size)",
        "torch._foreach_mul_(sums, engine.expected_batch_size / self._divisor)",
        (f"{SCALE}::test_the_expected_batch_size_of_the_step_is_what_sums_are_divided_by",),
    ),
    Mutant(
        "uses of a parameter are counted apart",
        COMBINE,
        "return [part[0] if len(part) == 1 else _join(part) for part in parts.values()]",
        "return list(records)",
        ("tests/nn/test_corners.py", "tests/nn/test_zoo.py"),
    ),
    Mutant(
        "cross term of tied weights left out",
        COMBINE,
        "total = own + 2 * cross + ",
        "total = own + ",
        ("tests/kernels/test_factored_bounds.py::test_contribution_of_a_tied_weight_is_bounded",),
    ),
    Mutant(
        "norms rounded to nearest",
        NUMERICS,
        "y = torch.where(y.double() < upper, torch.nextafter(y, torch.full_like(y, torch.inf)), y)",
        "y = y + 0.0",
        (f"{BOUNDS}::test_norms_of_unlucky_rows_are_not_below_the_exact_ones",),
    ),
    Mutant(
        "norm is that of the largest tensor",
        NORM,
        "total = torch.stack([sum_sq(p) for p in parts]).sum(0)",
        "total = torch.stack([sum_sq(p) for p in parts]).amax(0)",
        ("tests/kernels/test_specs.py",),
    ),
    Mutant(
        "bias missing from the norm of a head",
        HEAD,
        "(x.square().sum(1) + (bias is not None))",
        "x.square().sum(1)",
        (f"{BOUNDS}::test_one_row_moves_the_head_by_at_most_the_threshold",),
    ),
    Mutant(
        "factors above 1",
        CLIP,
        ".clamp(max=1.0))\n    # 0 / 0",
        ".clamp(max=1.01))\n    # 0 / 0",
        ("tests/kernels/test_specs.py",),
    ),
    Mutant(
        "factors rounded to nearest",
        NUMERICS,
        "y = torch.where(y.double() > x, torch.nextafter(y, torch.zeros_like(y)), y)",
        "y = y + 0.0",
        (f"{BOUNDS}::test_factors_are_rounded_down",),
    ),
    Mutant(
        "samples with NaN let through",
        NUMERICS,
        "torch.nan_to_num(y, nan=torch.inf, posinf=torch.inf)",
        "torch.nan_to_num(y, nan=0.0, posinf=torch.inf)",
        (f"{BOUNDS}::test_bad_samples_add_exactly_nothing",),
    ),
    Mutant(
        "the trainer clips by a public constant of its own",
        MECHANISM,
        "clip_coef(grad_norm_sq(own), threshold)",
        "clip_coef(grad_norm_sq(own), 2 * threshold)",
        (f"{MECHANISM_TESTS}::test_one_row_moves_the_sum_by_at_most_the_threshold",),
    ),
]

LOOP_MUTANTS = [
    Mutant(
        "public rows are clipped",
        ENGINE,
        "return self._public > 0",
        "return False",
        ("tests/nn/test_engine.py::test_public_gradients_are_ordinary",),
    ),
    Mutant(
        "private rows after public ones are not clipped",
        ENGINE,
        "            self._public -= 1",
        "            pass",
        ("tests/nn/test_engine.py::test_public_and_private_rows_in_one_step",),
    ),
    Mutant(
        "sums of a failed backward pass are kept",
        SUMS,
        "        self.staged.clear()\n        if not self.totals:",
        "        if not self.totals:",
        (f"{STEPS}::test_a_failed_backward_pass_leaves_nothing",),
    ),
    Mutant(
        "a sample may take part twice",
        PASSES,
        "if earlier - {None, now.number}:",
        "if False:",
        ("tests/nn/test_refusals.py", REVIEW),
    ),
    Mutant(
        "two batches are clipped as one",
        PASSES,
        "if len(now.forwards) > 1 and not self._engine.joint_forwards:",
        "if False:",
        ("tests/nn/test_refusals.py", REVIEW),
    ),
    Mutant(
        "a second pass may have larger gradients",
        PASSES,
        "if first is None or (first.isfinite() & ~(norm_sq <= first * (1 + 2e-5))).any():",
        "if first is None:",
        (f"{REVIEW}::test_two_passes_that_recompute_something_else",),
    ),
    Mutant(
        "gradients from elsewhere are stepped",
        ENGINE,
        "            check_grads(trained, self._attached.known_grads)\n",
        "",
        (f"{REVIEW}::test_a_gradient_from_elsewhere_is_not_stepped", REVIEW),
    ),
    Mutant(
        "ordinary gradients reach private parameters",
        ATTACH,
        "elif grad is not None and not self._pulls:",
        "elif False:",
        ("tests/nn/test_refusals.py",),
    ),
    Mutant(
        "batches of one size for Poisson ones",
        SAMPLER,
        _TAKEN,
        "taken = self._noise.uniform(self.num_samples).argsort()[: round(rate * self.num_samples)].sort().values",
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "the trainer's batches have one size",
        MECHANISM,
        _CHOSEN,
        "chosen = self.noise.uniform(len(rows.y)).argsort()[: round(sample_rate * len(rows.y))]",
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "the trainer draws the same batch in each step",
        MECHANISM,
        _CHOSEN,
        "chosen = Noise(seed=0).uniform(len(rows.y), rows.x.device) < sample_rate",
        (AUDIT_CHECKS,),
    ),
    Mutant(
        "batches are 2 % too large",
        SAMPLER,
        _TAKEN,
        _TAKEN.replace("rate)", "1.02 * rate)"),
        (AUDIT_CHECKS, "tests/nn/test_sampler.py"),
    ),
    Mutant(
        "rates are rounded up",
        NOISE,
        "return math.floor(rate * 2.0**53)",
        "return math.ceil(rate * 2.0**53)",
        (f"{MECHANISM_TESTS}::test_a_rate_is_rounded_down_to_what_coins_can_show",),
    ),
    Mutant(
        "the trainer's rate is not rounded down",
        MECHANISM,
        "        sample_rate = coin_rate(sample_rate)\n",
        "",
        (f"{MECHANISM_TESTS}::test_a_rate_is_rounded_down_to_what_coins_can_show",),
    ),
    Mutant(
        "one step more than is accounted for",
        PHASE,
        "for number in range(finished + 1, (config.steps if last is None else last) + 1):",
        "for number in range(finished, (config.steps if last is None else last) + 1):",
        (f"{PHASES}::test_a_fixed_threshold_stays", PHASES),
    ),
    Mutant(
        "threshold from private rows",
        PHASE,
        "norm_sq = public_norms(norm_sq, config)",
        "norm_sq = public_norms(model.grad_sum(private)[1], config)",
        (f"{TRAINER_TESTS}::test_what_leaves_depends_on_private_rows_through_noise_only",),
    ),
    Mutant(
        "subspace from private rows",
        PHASE,
        "grads = torch.cat(list(model.grad_sample(public)))",
        "grads = torch.cat(list(model.grad_sample(private)))",
        (f"{PHASES}::test_the_subspace_follows_the_public_gradients", PHASES),
    ),
    Mutant(
        "the trainer divides by the number of private rows",
        PHASE,
        "denominator = config.expected_batch_size + weight",
        "denominator = len(private.y) + weight",
        (f"{PHASES}::test_the_denominator_is_the_public_constant",),
    ),
    Mutant(
        "public and private rows may overlap",
        ROWS,
        "    if pairs:\n",
        "    if False:\n",
        ("tests/trainer/test_rows.py::test_disjoint",),
    ),
]

ACCOUNTING_MUTANTS = [
    Mutant(
        "accountant off by a factor: steps are not composed",
        PRIVACY,
        "full = _spent_on_full_batches(noise_multiplier / math.sqrt(steps), delta)",
        "full = _spent_on_full_batches(noise_multiplier, delta)",
        (f"{PRIVACY_TESTS}::test_full_batch_is_exactly_gaussian",),
    ),
    Mutant(
        "Poisson steps counted by half",
        PRIVACY,
        "SelfComposedDpEvent(event, count)",
        "SelfComposedDpEvent(event, max(1, count // 2))",
        (f"{PRIVACY_TESTS}::test_events_of_a_sampler_cost_what_dp_accounting_says", PRIVACY_TESTS),
    ),
    Mutant(
        "epsilon of Poisson batches at ten times delta",
        PRIVACY,
        "return min(bound, float(accountant.get_epsilon(sure)))",
        "return min(bound, float(accountant.get_epsilon(10 * sure)))",
        (f"{PRIVACY_TESTS}::test_events_of_a_sampler_cost_what_dp_accounting_says", PRIVACY_TESTS),
    ),
    Mutant(
        "epsilon of full batches at ten times delta",
        PRIVACY,
        "get_epsilon_gaussian(sigma, delta)",
        "get_epsilon_gaussian(sigma, 10 * delta)",
        (f"{PRIVACY_TESTS}::test_full_batch_is_exactly_gaussian",),
    ),
    Mutant(
        "what transforms hide of a small delta is not taken off",
        PRIVACY,
        "sure = delta - _HIDDEN * sum(count for _, count in parts)",
        "sure = delta",
        ("tests/trainer/test_accounting.py::test_rounding_of_the_transforms_hides_nothing_of_a_small_delta",),
    ),
    Mutant(
        "epsilon of several runs is below the truth by a rounding",
        PRIVACY,
        "bound = _spent_on_full_batches(1 / _mu(runs), delta)",
        "bound = float(dp_accounting.get_epsilon_gaussian(1 / _mu(runs), delta))",
        ("tests/trainer/test_accounting.py::test_full_batches_of_several_runs_cost_what_the_closed_form_says",),
    ),
    Mutant(
        "truncated batches accounted as Poisson ones",
        PRIVACY,
        "    if event.max_batch_size is None:\n        return spent(",
        "    if True:\n        return spent(",
        (f"{PRIVACY_TESTS}::test_what_a_sampler_mints_is_accounted_and_truncation_costs",),
    ),
    Mutant(
        "full batches reported as Poisson ones",
        "adamix/recorder.py",
        "steps=self._charged, sample_rate=self.config.sample_rate",
        "steps=self._charged, sample_rate=0.5 * self.config.sample_rate",
        (TRAINER_TESTS,),
    ),
]

MUTANTS = [
    *NOISE_MUTANTS,
    *CLIPPING_MUTANTS,
    *LOOP_MUTANTS,
    *ACCOUNTING_MUTANTS,
    *LEDGER_MUTANTS,
    *MIXED_MUTANTS,
    *RESUME_MUTANTS,
    *SECURE_MUTANTS,
    *COMPILE_MUTANTS,
    *GRAPHED_MUTANTS,
    *USER_MUTANTS,
    *FLOW_MUTANTS,
    *DEEP_TRAINER_MUTANTS,
    *SUBSPACE_MUTANTS,
    *DISTRIBUTED_MUTANTS,
    *SHARD_MUTANTS,
    *PLAN_MUTANTS,
    *COMBO_MUTANTS,
    *PLANNED_MUTANTS,
]
