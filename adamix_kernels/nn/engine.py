"""The engine: a model, an optimizer and a plain loop become private."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from adamix_kernels.nn import attention as _attention  # noqa: F401  attaches rules
from adamix_kernels.nn import compiled
from adamix_kernels.nn import recurrent as _recurrent  # noqa: F401
from adamix_kernels.nn import rules_layers as _rules_layers  # noqa: F401
from adamix_kernels.nn.adaptive import PublicQuantile
from adamix_kernels.nn.attach import Attachment
from adamix_kernels.nn.checks import (
    check_free,
    check_grads,
    check_parameters,
    check_restoring,
    check_settings,
    check_step,
    check_uncompiled,
    check_unit,
)
from adamix_kernels.nn.clipping import checked
from adamix_kernels.nn.distributed import agreed_noise, ranks_of, settings_of, unwrapped
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.forwards import Forwards
from adamix_kernels.nn.graphed import Graphed
from adamix_kernels.nn.hooks import outside
from adamix_kernels.nn.metrics import Metrics
from adamix_kernels.nn.mixed import PublicRows
from adamix_kernels.nn.passes import Passes
from adamix_kernels.nn.rules import Rules
from adamix_kernels.nn.subspace import PublicSubspace
from adamix_kernels.nn.sums import StepSums
from adamix_kernels.nn.validate import validate
from adamix_kernels.ops.noise import Noise, warn_if_fast


class DPEngine:
    """Trains a model privately in its own loop: every backward pass is clipped per sample, every step gets noise.

    Args:
        model: any module whose inputs have the batch in dimension 0. It keeps its class, forward and state_dict.
        optimizer: holds all trainable parameters of the model and no other.
        max_grad_norm: the threshold C of a sample's gradient, above 0; with `strategy="per_layer"` a number is spread
            evenly, C / sqrt(layers) each, and a dict gives each layer (a module's name) its own. May be set anew before
            each backward pass, also to a scalar tensor on the device, as `dp.max_grad_norm`. A `PublicQuantile` lets
            the public rows of `mixed` set it; with "per_layer" each layer's noise then follows its own threshold.
        noise_multiplier: standard deviation of the noise over the threshold, on the sum; 0 adds none.
        expected_batch_size: what the noisy sum is divided by, a public constant: sample_rate times the data set's size,
            never the size of a batch.
        strategy: "book_keeping" keeps activations and backprops of every layer until the norms are known: one
            backward pass. "two_pass" needs the least memory and a second pass: call `dp.backward(loss)`. "per_layer"
            clips each layer by itself, within the backward pass. "materialize" makes all per-sample gradients.
            "auto" is "book_keeping" that keeps a layer's per-sample gradients instead where they are few or smaller
            than its activations and backprops, as the last two do too; `validate` prints what each would take.
        clipping: "flat" clips samples above the threshold; "automatic" normalises every sample (Bu et al. 2022).
        loss_reduction: "mean" if the loss is the mean over the samples of a batch, "sum" if their sum. A mean over
            something else, such as the tokens that are not padding, depends on other samples: use a sum.
        loss_scale: what the loss was multiplied with before backward(), for float16; a power of 2.
            A GradScaler is no use: it looks at gradients before the step, where there are none.
        joint_forwards: whether one backward pass may go through several forward passes of the model, whose rows b then
            are one sample, such as both sides of a pair. Without it that is an error.
        measure_signal: whether `metrics()` is to tell the signal to noise, which reads the sums once more in each step.
        noise: its source; None takes a key of the operating system. With `Noise(mode="secure")` sums and noise are on
            an integer grid (`adamix_kernels.ops.grid`): a sample's contribution is at most C exactly, and no low bit of
            a release tells of the data. Then the gradients of all samples are made, whatever the strategy, which
            "two_pass" cannot; and max_grad_norm may change only between steps. Otherwise thresholds hold up to
            rounding, and releases are not hardened against attacks on floating point.
        process_group: of the ranks that train one model together, each on samples of its own (see `nn.distributed`).
            None takes that of a model in DistributedDataParallel, or sharded by `fully_shard`; "local" says that this
            process trains alone, though others run. All settings are equal on all ranks, `expected_batch_size` counts
            the samples of all of them. Each rank takes every step, also one without samples; with `fully_shard` also
            every forward and backward pass. The key of the noise is rank 0's and crosses the network of the job.
        unit: whose data is protected, "sample" or "user". With "user" each backward pass runs within `dp.users(ids)`,
            the gradients of a user's rows are added before they are clipped, all of a user's rows are in one backward
            pass of a step, and expected_batch_size counts users. Gradients of all samples are made here too. For the
            accounting of Poisson batches users have to be drawn, not rows: a `PoissonSampler` of as many samples as
            there are users, and then all rows of those that it takes.

    The privacy of a step is that of one Gaussian mechanism with `noise_multiplier`, for adding or removing one sample,
    or one user. Between two steps each may take part in one backward pass. Micro-batches simply call backward() more
    often.
    What cannot be seen from here is the caller's: the loss of a sample must not depend on other samples (no contrastive
    terms, mixing or normalising across the batch), nor the way through the model on their values.

    Raises:
        PrivacyError: at once, or in the forward or backward pass, for what cannot be made private, with the remedy.
        TypeError, ValueError: names the argument that does not fit.

    Source: Abadi et al. 2016 (arXiv 1607.00133); Bu et al. 2023 (arXiv 2210.00038) for one backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | Tensor | dict[str, float] | PublicQuantile,
        noise_multiplier: float,
        expected_batch_size: float,
        strategy: str = "auto",
        clipping: str = "flat",
        loss_reduction: str = "mean",
        loss_scale: float = 1.0,
        joint_forwards: bool = False,
        measure_signal: bool = False,
        noise: Noise | None = None,
        unit: str = "sample",
        process_group: Any = None,
    ) -> None:
        check_settings(strategy, clipping, loss_reduction, noise_multiplier, expected_batch_size, loss_scale)
        wrapper, model = model, unwrapped(model)
        check_uncompiled(wrapper)
        check_uncompiled(model)  # within DistributedDataParallel
        check_unit(unit, strategy, noise)
        self.ranks = ranks_of(wrapper, process_group)
        if self.ranks is not None and measure_signal:
            raise ValueError("measure_signal: is not measured over several ranks; pass False")
        self.shards = self.ranks.shards if self.ranks is not None else None
        check_free(model, self.shards is not None)
        self.model, self.optimizer = model, optimizer
        self._forwards = Forwards(self)
        check_parameters(model.named_parameters(), optimizer)
        self.noise_multiplier, self.expected_batch_size = float(noise_multiplier), float(expected_batch_size)
        self.strategy = strategy
        self.clipping, self.loss_reduction, self.loss_scale = clipping, loss_reduction, float(loss_scale)
        self.joint_forwards, self.measure_signal = joint_forwards, measure_signal
        self.noise = agreed_noise(self.ranks, Noise() if noise is None else noise)
        if noise_multiplier:
            warn_if_fast(self.noise.mode, stacklevel=2)
        self.steps = 0
        self.layers = {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
        self._attached = Attachment(self)
        self.public_rows: PublicRows | None = None  # of the backward passes within mixed()
        self.max_grad_norm = max_grad_norm
        self._subspace: PublicSubspace | None = None
        self._sums = StepSums(self, unit)
        self._public = 0
        self._rules, self._passes = Rules(self), Passes(self)
        self._number, self._sink = compiled.announce(self)
        self._restoring = False
        if self.ranks is not None:
            self.ranks.check_equal(settings_of(self, unit))
            self.ranks.check_weights(list(model.named_parameters()))
        self._attached.attach(wrapper)

    def detach(self) -> None:
        """Take the engine off: the model and the optimizer are as they were. Sums of an unfinished step are lost."""
        self._attached.detach()
        self._forget()
        self._subspace = None

    # --- forward and backward ------------------------------------------------------------------------------------

    @property
    def is_public(self) -> bool:
        return self._public > 0

    @contextmanager
    def public(self) -> Iterator[None]:
        """Forward and backward passes inside are ordinary: for rows that are public. Their gradients are not clipped;
        they are in `.grad`, to which the step adds the noisy private mean."""
        self._passes.check_unrecorded("public()")
        self._public += 1
        try:
            yield
        finally:
            self._public -= 1

    @contextmanager
    def mixed(self, public_rows: Any, weight: float = 1.0) -> Iterator[None]:
        """Backward passes inside are of batches that have public rows among the private ones.

        `.grad` of the step is (clipped private sum + noise + sum of `weight` times each public gradient) /
        (expected_batch_size + `weight` times the number of public rows since the last step). Public gradients are
        exact, as within `public()`, and are added after the noise, so they change neither thresholds nor sensitivity;
        only where `max_grad_norm` is a `PublicQuantile` do their norms set the threshold. Metrics are of private rows.

        Args:
            public_rows: bool `[B]`, True for a public row, or a slice of the batch. A mask on a device is waited for
                once. Rows at one end of the batch, `slice(0, n)` or such a mask, are read in place, others copied.
            weight: of a public row beside a private one, 0 or above; with 0 public rows only set thresholds.

        With `unit="user"` the ids of `users` are those of the private rows. In secure mode the loss must be a sum. What
        floating point leaves open elsewhere, it does here: a public gradient, and so a threshold, may differ in its
        last bits where its batch is one row longer.

        Raises:
            PrivacyError: within `public()`; or, in backward(), the mask is of another number of rows.
            TypeError, ValueError: names the argument that does not fit.

        Source: Golatkar et al. 2022 (arXiv 2203.11481), the mixed step.
        """
        rows = PublicRows(public_rows, weight)
        if self.is_public:
            raise PrivacyError("mixed(): called within public(), where all rows are public and none is clipped")
        outer, self.public_rows = self.public_rows, rows
        try:
            yield
        finally:
            self.public_rows = outer

    def users(self, ids: Any) -> AbstractContextManager[None]:
        """Backward passes inside are of rows whose users are `ids`: integers `[B]`, equal for rows of one user.

        Raises:
            PrivacyError: the engine's unit is not "user"; or, in backward(), the ids are not as many as the rows, or
                one was in another backward pass since the last step.
            TypeError, ValueError: the ids are no integers `[B]`.
        """
        if self._sums.users is None:
            raise PrivacyError("users(): the engine protects samples; pass unit='user' to the DPEngine")
        return self._sums.users.of(ids)

    def public_subspace(
        self,
        rank: int | None = None,
        energy: float | None = None,
        every: int = 1,
        parameters: Sequence[str] | None = None,
        quantile: float | None = None,
        max_bytes: int = 1 << 30,
    ) -> PublicSubspace:
        """From now on clip, and add noise to, private gradients in the leading directions of public ones.

        Call `refresh(loss)` of the result before each batch. Noise has as many numbers as there are directions;
        privacy is as without a subspace (`adamix_kernels.nn.subspace` has the proof). Neither public gradients nor the
        directions are made: factors of the public rows are kept. With strategy "per_layer" each layer has directions
        of its own, else they are of all parameters together.

        Args:
            rank: at most so many directions.
            energy: as few as retain this fraction of the squared public gradients, in (0, 1]. With `rank`, the smaller
                of both; with neither, all. Fewer where public gradients span fewer dimensions, up to rounding.
            every: for how many steps the same directions are used.
            parameters: names or patterns (`fnmatch`) of those to project, such as `["head.*", "*lora*"]`; None is all.
                Gradients of other trainable parameters are clipped as they are, and by themselves: of G groups that
                are, each has noise of sqrt(G) noise_multiplier times its threshold.
            quantile: thresholds of coordinates are this quantile of the norms of the public rows' own, in (0, 1]; None
                takes max_grad_norm.
            max_bytes: what public rows may take in memory; beyond that `refresh` raises.

        Raises:
            TypeError, ValueError: names the argument that does not fit, among them `strategy="two_pass"`, and a
                max_grad_norm that is a `PublicQuantile`.
            PrivacyError: a backward pass waits for its step, or the engine has several ranks; in backward(), within
                `mixed`.

        Source: Golatkar et al. 2022 (arXiv 2203.11481), section 4.
        """
        self._subspace = PublicSubspace(self, rank, energy, every, parameters, quantile, max_bytes)
        return self._subspace

    @property
    def keeps_factors(self) -> bool:
        """Whether gradients wait for the norms of all layers."""
        return self.strategy in ("auto", "book_keeping", "materialize")

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, twice where the strategy is "two_pass": for the norms, then for the clipped sums."""
        if self.strategy == "two_pass":
            self._passes.run_twice(loss)
        else:
            loss.backward()

    def graphed(self, loss_fn: Callable[..., Tensor], *example: Tensor) -> Graphed:
        """Capture the private forward and backward pass of batches like `example` in a CUDA graph.

        `run = dp.graphed(loss_fn, x, y)` runs the pass three times before, of which nothing counts. Then each
        `loss = run(x, y)` copies a batch of the same shapes in, replays the pass at the weights and `max_grad_norm` of
        now, and adds its clipped sums as backward() would: call it once or more often before each `optimizer.step()`,
        which draws its noise outside the graph. Where Poisson batches differ in size, pad them with rows whose loss has
        weight 0, and pass loss_reduction="sum"; `metrics()` counts these rows too. Gradients are kept in factors, also
        with strategy "auto" and "per_layer". Only what runs on the device is replayed, no Python of the model or of
        `loss_fn`; dropout draws anew in each replay.

        Args:
            loss_fn: gives the loss of `loss_fn(model, *batch)`, a scalar; it calls neither backward() nor step() nor
                zero_grad(), and opens autocast itself. It has all samples from `batch`: others that it reads, such as
                labels, would be those of the capture in each replay, and count each time.
            example: the tensors of a batch, on the model's CUDA device.

        Raises:
            PrivacyError: the model is compiled, or not on one CUDA device; the strategy is "two_pass" or "materialize";
                noise is secure, the unit is "user", thresholds are a dict or a `PublicQuantile`; there is a public
                subspace, or several ranks; it is called within `public()`, `mixed()` or autocast; `loss_fn` or the
                model draws random numbers on the host, goes through the model of another engine, gives the model labels
                to average over, or calls a function without a rule. A call: the same, or memory, settings of clipping,
                trained parameters or modes of modules are not those captured.
            TypeError, ValueError: what is passed is no tensor; a batch has other shapes, dtypes or devices.
            RuntimeError: of torch, for a model that reads numbers on the host or cannot be captured otherwise, such as
                checkpoint() that preserves random states; or while the loss of an ordinary pass is still held, whose
                nodes belong to another stream.

        Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs for what a graph can hold.
        """
        return Graphed(self, loss_fn, example)

    @property
    def max_grad_norm(self) -> float | Tensor | Mapping[str, float] | PublicQuantile:
        """The threshold of the backward passes to come."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | Tensor | Mapping[str, float] | PublicQuantile) -> None:
        bounded = self.noise_multiplier > 0 or self.clipping == "automatic"
        sums: StepSums | None = vars(self).get("_sums")  # None within __init__
        if sums is not None and sums.begun and (isinstance(value, PublicQuantile) or sums.adaptive is not None):
            raise PrivacyError(
                "max_grad_norm: was changed to or from a PublicQuantile between the backward passes of one step, whose "
                "noise is for one kind of threshold; change it after the step, or call zero_grad() first"
            )
        self._max_grad_norm = (
            value
            if isinstance(value, PublicQuantile)
            else checked(value, self.strategy, set(self.layers.values()), bounded)
        )

    @property
    def thresholds(self) -> Tensor | dict[str, Tensor]:
        """Those in use, scalars float64 on the device: of the whole gradient, or with "per_layer" of each trained layer
        that has one. Where public rows set them they are free to publish.

        Raises:
            RuntimeError: no public row has set one yet.
        """
        return self._sums.thresholds

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._passes.check_unrecorded("optimizer.step()")
        with torch._C.DisableTorchFunctionSubclass():
            if self.shards is not None:
                self.shards.rest()
            check_parameters(self.model.named_parameters(), optimizer, {id(p) for _, p in self._attached.stepped})
        check_step(args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if self._restoring:
                check_restoring([p.grad for _, p in self._attached.stepped], self._sums.totals)
                return
            trained = [(name, p) for name, p in self._attached.stepped if p.requires_grad]
            check_grads(trained, self._attached.known_grads)
            self._attached.add_grads(trained, self._sums.release(trained))
        self._forget()
        self._passes.forget_forwards()
        self._forwards.batch_size = None  # parts of the model that are called alone would be taken for the last batch
        self.steps += 1
        self._attached.make_ordinary()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's own, which also drops the sums of backward passes since the last step."""
        if torch.compiler.is_compiling():
            outside(self.zero_grad, set_to_none)
            return
        self._passes.check_unrecorded("zero_grad()")
        with torch._C.DisableTorchFunctionSubclass():
            self._attached.zero_grad(set_to_none)
            self._attached.known_grads &= {name for name, p in self._attached.stepped if p.grad is not None}
        self._forget()

    def _forget(self) -> None:
        self._sums.forget()
        self._passes.forget()

    # --- what it knows -------------------------------------------------------------------------------------------

    validate = validate

    def metrics(self) -> Metrics:
        """Of the last step, and private: no guarantee covers them. The host waits for the device only to read them.

        Over several ranks, of this rank's samples and what it knows of the sums.
        """
        if self._sums.metrics is None:
            raise RuntimeError("metrics(): no step was taken yet")
        return self._sums.metrics

    def gather(self, x: Tensor) -> Tensor:
        """Values `[n]` of public rows, of all ranks in their order, n any number on each; without ranks `x` itself.

        So that thresholds from public norms are the same on all ranks. Every rank must call it.
        """
        return x if self.ranks is None else self.ranks.gather(x)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """`get_state_dict` and `set_state_dict` of torch.distributed.checkpoint go inside.

        They make an optimizer's state by a step on zero gradients, which then is no private step.

        Raises:
            PrivacyError: in the step, if a gradient is not zero, or a backward pass has been since the last step.
        """
        self._restoring = True
        try:
            yield
        finally:
            self._restoring = False

    def state_dict(self) -> dict[str, Any]:
        """Steps taken and settings; never the key of the noise: a resumed run draws a fresh one."""
        limit = self.max_grad_norm
        adaptive = self._sums.adaptive
        return {
            "steps": self.steps,
            "max_grad_norm": dict(limit) if isinstance(limit, Mapping) else None if adaptive else limit,
            **({"public_quantile": adaptive.state()} if adaptive else {}),
            "noise_multiplier": self.noise_multiplier,
            "expected_batch_size": self.expected_batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.steps = int(state["steps"])
        noise_multiplier, expected_batch_size = state["noise_multiplier"], state["expected_batch_size"]
        kinds = self.strategy, self.clipping, self.loss_reduction
        check_settings(*kinds, noise_multiplier, expected_batch_size, self.loss_scale)
        self.noise_multiplier, self.expected_batch_size = noise_multiplier, expected_batch_size
        adaptive = state.get("public_quantile")
        self.max_grad_norm = PublicQuantile(**adaptive["rule"]) if adaptive else state["max_grad_norm"]
        if adaptive:
            self._sums.load_thresholds(adaptive)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "DPEngine: cannot be pickled or copied, two would share a model and repeat noise; save "
            "dp.state_dict(), and make a new engine of the loaded model"
        )
