"""The settings of a run of `DeepAdaMix`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adamix.config import LARGE, SMALL, Budget

STRATEGIES = ("auto", "book_keeping", "per_layer", "materialize")
PRECISIONS = ("float32", "bfloat16", "autocast")
OPTIMIZERS = ("adamw", "sgd")
SHARDINGS = ("none", "fsdp")


@dataclass(frozen=True, kw_only=True)
class DeepConfig(Budget):
    """What a run does. Fields that cost privacy come first.

    Args:
        epsilon: privacy budget, above 0; `inf` trains without noise, and says so.
        expected_batch_size: the number of private rows a step is expected to see, as a constant that may be public
            (a planned size, a published count), not read off the data. Sums are divided by it.
        delta: probability of exceeding epsilon, in (0, 1).
        sample_rate: probability with which each private row enters a step, independently (Poisson sampling), in
            (0, 1]; 1 takes all rows at every step.
        steps: private steps T.
        quantile: the thresholds of a step are this quantile of the norms of its public rows, in (0, 1]. None: the
            fixed `max_grad_norm`.
        max_grad_norm: the fixed threshold; only with `quantile=None`.
        strategy: of the engine: "per_layer" has a threshold for each layer; "auto", "book_keeping" and "materialize"
            have one for all.
        threshold_every: steps between two choices of the thresholds.
        public_batch_size: public rows in each step, of both phases.
        public_weight: weight of a public row relative to a private one in the mixed update; 0 leaves them out.
        anchor: strength of the pull towards the phase-1 weights, in units of 1 / learning rate; 0: none.
        public_steps: steps of phase 1; 0 leaves it out.
        learning_rate: of phase 2.
        public_learning_rate: of phase 1; None: that of phase 2.
        optimizer: "adamw" (without weight decay) or "sgd" (momentum 0.9), in both phases.
        tune: "full", "head", "bias", "lora", or patterns of parameter names with spaces between them.
        head: name of the module that "head", "bias" and "lora" train; None: it is looked for.
        lora_rank: rank of the adapters.
        micro_batch_size: rows in one backward pass, public and private ones; a batch that is larger takes several.
            None: what five batches in six fit in. Of several ranks each has passes of this size.
        precision: "float32"; "autocast" (bfloat16 where torch deems it safe); "bfloat16" (parameters too).
        checkpointing: whether activations are computed again in the backward pass, to save memory; of models of
            transformers.
        compile: whether the model is compiled, by torch.compile.
        sharding: "none" leaves the model as it is; "fsdp" shards its blocks over the ranks of the job, by fully_shard.
        num_workers: threads that load the rows of a batch.
        seed: draws the public rows of each step; never private rows or noise.
        noise_mode: "fast" (Philox, sums in floating point) or "secure" (ChaCha20, sums and noise on an integer grid).
        noise_seed: None keys the noise from the operating system. A number makes the run reproducible and voids the
            guarantee towards whoever knows it: for benchmarks.

    Raises:
        InputError: names the field, what was given and what to pass.
    """

    steps: int = 200
    quantile: float | None = 0.9
    max_grad_norm: float | None = None
    strategy: str = "per_layer"
    threshold_every: int = 1
    public_batch_size: int = 64
    public_weight: float = 1.0
    anchor: float = 0.0
    public_steps: int = 100
    learning_rate: float = 1e-3
    public_learning_rate: float | None = None
    optimizer: str = "adamw"
    tune: str = "full"
    head: str | None = None
    lora_rank: int = 8
    micro_batch_size: int | None = None
    precision: str = "float32"
    checkpointing: bool = False
    compile: bool = False
    sharding: str = "none"
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_threshold(self.quantile, self.max_grad_norm)
        self._require("strategy", self.strategy in STRATEGIES, f"pass one of {', '.join(STRATEGIES)}")
        self._require("precision", self.precision in PRECISIONS, f"pass one of {', '.join(PRECISIONS)}")
        self._require("sharding", self.sharding in SHARDINGS, f"pass one of {', '.join(SHARDINGS)}")
        self._require("optimizer", bool(self.optimizer), f"pass one of {', '.join(OPTIMIZERS)}")
        self._require("tune", bool(self.tune.split()), "pass 'full', 'head', 'bias', 'lora', or patterns of names")
        for name in ("threshold_every", "public_batch_size", "lora_rank"):
            self._require(name, 1 <= getattr(self, name) <= 10**9, "pass a whole number >= 1")
        for name in ("public_steps", "num_workers", "seed"):
            self._require(name, 0 <= getattr(self, name) < 2**31, "pass a whole number >= 0")
        for name in ("public_weight", "anchor"):
            self._require(name, 0 <= getattr(self, name) <= LARGE, f"pass a number in [0, {LARGE:g}]")
        for name in ("learning_rate", "public_learning_rate"):
            rate = getattr(self, name)
            self._require(name, rate is None or SMALL <= rate <= LARGE, f"pass a number in [{SMALL:g}, {LARGE:g}]")
        size = self.micro_batch_size
        self._require(
            "micro_batch_size",
            size is None or size > self.public_batch_size,
            f"pass more than public_batch_size, {self.public_batch_size}, or None: the public rows are in one pass",
        )

    def rows_per_pass(self, ranks: int = 1) -> int:
        """Rows in one backward pass of a rank. It follows from what may be public, never from a batch that was drawn.

        Without `micro_batch_size`: what a batch exceeds by more than its standard deviation in one case of six.
        """
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        expected = self.expected_batch_size / ranks
        spread = math.sqrt(expected * (1 - self.sample_rate))
        return math.ceil(self.public_batch_size / ranks) + math.ceil(expected + spread)
