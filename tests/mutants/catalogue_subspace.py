"""Planted bugs of the engine's subspace: what is clipped, its noise, and what is taken for public."""

from __future__ import annotations

from mutant import Mutant

SUBSPACE = "adamix_kernels/nn/subspace.py"
PRIVATE = "adamix_kernels/nn/subspace_sums.py"
BASIS = "adamix_kernels/nn/basis.py"
SUMS = "adamix_kernels/nn/sums.py"

TESTS = "tests/nn/test_subspace.py"
MODELS = "tests/nn/test_subspace_models.py"

SUBSPACE_MUTANTS = [
    Mutant(
        "coordinates are not clipped",
        PRIVATE,
        "            totals = clip_sum(grads, coef)\n",
        "            totals = clip_sum(grads, torch.ones_like(coef))\n",
        (f"{TESTS}::test_coordinates_are_clipped_as_they_are_if_the_basis_is_far_from_orthonormal",),
    ),
    Mutant(
        "coordinates get noise of one group only",
        PRIVATE,
        "return limit * (self._engine.noise_multiplier * math.sqrt(groups))",
        "return limit * self._engine.noise_multiplier",
        (f"{TESTS}::test_noise_of_groups_is_by_their_own_thresholds",),
    ),
    Mutant(
        "coordinates get no noise",
        PRIVATE,
        "        if engine.noise_multiplier and sums:\n",
        "        if False:\n",
        (f"{TESTS}::test_noise_is_of_as_many_numbers_as_directions_and_of_the_right_size[auto-fast]",),
    ),
    Mutant(
        "coordinates get the noise of the last threshold of a step",
        PRIVATE,
        "[p[group] for p in self._passes if group in p]",
        "[]",
        (f"{TESTS}::test_the_largest_threshold_of_a_step_sets_its_noise",),
    ),
    Mutant(
        "a step without a sample gets the noise of the threshold before",
        PRIVATE,
        "            self._engine._sums.threshold = self._engine._sums._threshold_now()\n",
        "            pass\n",
        (f"{TESTS}::test_a_step_without_a_sample_has_the_noise_that_one_with_a_sample_would_have",),
    ),
    Mutant(
        "a layer that no sample reaches gets the noise of another threshold",
        PRIVATE,
        "self._staged.limits |= {group: self._subspace.limit(group) for group in trained}",
        "self._staged.limits |= {group: self._subspace.limit(group) for group in groups}",
        (f"{TESTS}::test_a_layer_that_no_sample_reaches_has_the_noise_of_the_threshold_of_the_pass",),
    ),
    Mutant(
        "public rows are kept where the loop writes private ones",
        SUBSPACE,
        "copied(part, copies)",
        "part",
        (f"{TESTS}::test_what_is_kept_is_a_copy",),
    ),
    Mutant(
        "a users rows are clipped one by one in the subspace",
        PRIVATE,
        "found if users is None else users.folded(found)",
        "found",
        (f"{TESTS}::test_a_users_rows_are_added_before_they_are_clipped",),
    ),
    Mutant(
        "coordinates of two subspaces are added up",
        SUBSPACE,
        "        if self.sums.pending:\n",
        "        if False:\n",
        (f"{TESTS}::test_it_is_not_changed_within_a_step",),
    ),
    Mutant(
        "a subspace is used for ever",
        SUBSPACE,
        "return self._made_at is None or not 0 <= self._engine.steps - self._made_at < self._every",
        "return self._made_at is None",
        (f"{TESTS}::test_it_is_due_every_so_many_steps_and_an_old_one_is_refused",),
    ),
    Mutant(
        "thresholds of coordinates may change within a secure step",
        PRIVATE,
        "if sums.grid is not None and any(p.get(group, limit) != limit for p in self._passes):",
        "if False:",
        (f"{TESTS}::test_thresholds_do_not_change_within_a_secure_step",),
    ),
    Mutant(
        "public rows count as samples of the step",
        SUMS,
        "        if subspace is not None and subspace.takes_public_rows:\n",
        "        if False:\n",
        (f"{TESTS}::test_public_rows_leave_no_gradient_and_count_as_no_sample",),
    ),
    Mutant(
        "gradients of all public rows are made",
        BASIS,
        "            total += inner_products(part, other[names])\n",
        "            made = [torch.cat([g.flatten(1) for g in f.grad_sample()], 1) for f in (part, other[names])]\n"
        "            total += (made[0] @ made[1].T).double()\n",
        (f"{MODELS}::test_no_tensor_of_rows_or_directions_times_parameters_is_made[gram]",),
    ),
]
