"""The settings of one AdaMix run: every part of the method is one field, so an ablation is one argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from adamix.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11

GEOMETRIES = (None, "whiten")
CLIPPINGS = ("flat", "per_layer")
#: Whole methods by name, as settings over the defaults: "paper" is AdaMix as published, with a subspace and without a
#: geometry; "conventional" trains on both kinds of rows by DP-GD with one fixed threshold and step, from zero.
PRESETS: dict[str, dict[str, Any]] = {
    "adamix": {},
    "paper": {"geometry": None, "subspace_energy": 0.95, "anchor": 1e-3},
    "conventional": {
        "geometry": None,
        "warm_start": False,
        "anchor": 0.0,
        "quantile": None,
        "max_grad_norm": 1.0,
        "learning_rate": 1.0,
    },
}
#: Beyond these, float32 weights and thresholds have no meaning.
SMALL, LARGE = 1e-12, 1e12
_KINDS = {"float": "a number", "int": "a whole number", "str": "a text", "bool": "True or False"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every private run states about its guarantee, and how settings are checked.

    Raises:
        InputError: names the field, what was given and what to pass.
    """

    epsilon: float
    expected_batch_size: int
    delta: float = 1e-5
    sample_rate: float = 1.0
    steps: int = 20
    noise_mode: str = "fast"
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_type(field.name, str(field.type))
        unlimited = self.epsilon == math.inf
        self._require(
            "epsilon", 0 < self.epsilon <= 1000 or unlimited, "pass a number in (0, 1000], or inf for no privacy"
        )
        self._require("delta", 0 < self.delta < 1, "pass a number in (0, 1), well below 1 / (private rows)")
        self._require("expected_batch_size", 1 <= self.expected_batch_size <= 10**12, "pass a public constant >= 1")
        self._require("sample_rate", 0 < self.sample_rate <= 1, "pass a probability in (0, 1]; 1 is full batch")
        self._require("steps", 1 <= self.steps <= 10**6, "pass a whole number in [1, 1000000]")
        self._require("noise_mode", self.noise_mode in ("fast", "secure"), "pass 'fast' or 'secure'")
        seeded = self.noise_seed is not None
        if seeded:
            object.__setattr__(self, "noise_seed", int(self.noise_seed or 0))  # NumPy's integers too
        self._require("noise_seed", not (seeded and self.noise_mode == "secure"), "secure noise takes no seed: drop it")

    @property
    def private_rows(self) -> float:
        """The number of private rows, as far as it is public."""
        return self.expected_batch_size / self.sample_rate

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The settings a trainer was called with.

        Raises:
            InputError: also for one that is missing, or that there is not.
        """
        if "expected_batch_size" not in settings:
            raise InputError(
                "expected_batch_size: missing; pass the number of private rows a step is expected to see, as a figure "
                "that may be public (a planned size, not a count of the data)"
            )
        if "epsilon" not in settings:
            raise InputError("epsilon: missing; pass the privacy budget, for instance 3.0")
        if unknown := settings.keys() - cls.__dataclass_fields__.keys():
            raise InputError(f"{min(unknown)}: no such setting; the settings are {', '.join(cls.__dataclass_fields__)}")
        return cls(**settings)

    def _check_type(self, name: str, annotation: str) -> None:
        kind, _, none = annotation.partition(" | ")
        types = {"float": Real, "int": Integral, "str": str, "bool": bool}[kind]
        value = getattr(self, name)
        fits = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
        self._require(name, fits or (value is None and bool(none)), f"pass {_KINDS[kind]}{' or None' if none else ''}")

    def _check_threshold(self, quantile: float | None, max_grad_norm: float | None) -> None:
        """Either a quantile of public norms, or a fixed threshold."""
        if quantile is None:
            fixed = max_grad_norm is not None and SMALL <= max_grad_norm <= LARGE
            self._require("max_grad_norm", fixed, f"with quantile=None pass a threshold in [{SMALL:g}, {LARGE:g}]")
        else:
            self._require("quantile", 0 < quantile <= 1, "pass a fraction in (0, 1], or None for max_grad_norm")
            self._require("max_grad_norm", max_grad_norm is None, "drop it, or pass quantile=None to fix it")

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise InputError(f"{name}: {getattr(self, name)!r} is not valid here; {remedy}")


@dataclass(frozen=True, kw_only=True)
class Config(Budget):
    """What a run does. Fields that cost privacy come first; defaults were chosen in `benchmarks/defaults.md`.

    Args:
        epsilon: privacy budget, above 0; `inf` trains without noise, and says so.
        delta: probability of exceeding it, in (0, 1).
        expected_batch_size: the number of private rows a step is expected to see, as a constant that may be public
            (a planned size, a published count), not read off the data. Sums are divided by it.
        sample_rate: probability with which each private row enters a step, independently (Poisson sampling), in
            (0, 1]; 1 takes all rows at every step.
        steps: private steps T.
        quantile: the threshold tau_t of a step is this quantile of the public per-sample gradient norms, in (0, 1].
            None: the fixed `max_grad_norm`. With `learning_rate=None` a quantile too small for the step is raised.
        max_grad_norm: the fixed threshold; only with `quantile=None`.
        clipping: "flat", one threshold over all parameters, or "per_layer", one each.
        subspace_rank: project onto at most so many leading directions of the public gradients. None: no such limit.
        subspace_energy: project onto the directions that retain this fraction of the squared public gradients.
            With neither, there is no projection.
        geometry: "whiten" learns a whitening of the features from the public rows and trains in it; None: as given.
        public_weight: weight of a public row relative to a private one in the mixed update; 0 leaves them out.
        learning_rate: step size in units of 1 / tau_t. None: the largest that keeps the noise it brings into a logit
            of a unit-norm feature within `logit_noise`, and the descent on the public loss stable.
        logit_noise: standard deviation of that noise over all steps; only with `learning_rate=None`. None: more, the
            more private rows there are for a public one and the less noise, see `schedule.logit_noise`.
        anchor: strength lambda of the pull towards the phase-1 weights; 0: none.
        warm_start: start phase 2 from the phase-1 weights; False: from the weights the model came with.
        public_l2: L2 of phase 1 towards the weights the model came with.
        public_steps: at most so many L-BFGS iterations in phase 1.
        noise_mode: "fast" (Philox, sums in floating point) or "secure" (ChaCha20, sums and noise on an integer grid,
            see `adamix_kernels.ops.grid`). Only "secure" is hardened against floating-point attacks.
        noise_seed: None keys the noise from the operating system. A number makes the run reproducible and voids the
            guarantee towards whoever knows it: for benchmarks.

    Raises:
        InputError: names the field, what was given and what to pass.
    """

    quantile: float | None = 0.9
    max_grad_norm: float | None = None
    clipping: str = "flat"
    subspace_rank: int | None = None
    subspace_energy: float | None = None
    geometry: str | None = "whiten"
    public_weight: float = 1.0
    learning_rate: float | None = None
    logit_noise: float | None = None
    anchor: float = 1e-5
    warm_start: bool = True
    public_l2: float = 1e-3
    public_steps: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_threshold(self.quantile, self.max_grad_norm)
        self._require("clipping", self.clipping in CLIPPINGS, f"pass one of {CLIPPINGS}")
        self._require("subspace_rank", self.subspace_rank is None or self.subspace_rank >= 1, "pass None or >= 1")
        energy = self.subspace_energy
        self._require("subspace_energy", energy is None or 0 < energy <= 1, "pass None or a fraction in (0, 1]")
        if self.clipping == "per_layer":
            self._require(
                "clipping", not self.projects, "a subspace spans all layers: use 'flat', or drop the subspace"
            )
        self._require("geometry", self.geometry in GEOMETRIES, f"pass one of {GEOMETRIES}")
        self._require("public_weight", 0 <= self.public_weight <= LARGE, f"pass a number in [0, {LARGE:g}]")
        rate = self.learning_rate
        self._require(
            "learning_rate",
            rate is None or SMALL <= rate <= LARGE,
            f"pass None, or a number in [{SMALL:g}, {LARGE:g}]",
        )
        noise = self.logit_noise
        self._require(
            "logit_noise",
            noise is None or SMALL <= noise <= LARGE,
            f"pass None, or a number in [{SMALL:g}, {LARGE:g}]",
        )
        self._require("anchor", 0 <= self.anchor <= LARGE, f"pass a number in [0, {LARGE:g}]")
        self._require("public_l2", 0 <= self.public_l2 <= LARGE, f"pass a number in [0, {LARGE:g}]")
        self._require("public_steps", self.public_steps >= 1, "pass a whole number >= 1")

    @property
    def projects(self) -> bool:
        return self.subspace_rank is not None or self.subspace_energy is not None
