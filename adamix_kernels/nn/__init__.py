"""Private training of any torch model: rules for the functions a parameter is used by, and the engine."""

from adamix_kernels.nn.adaptive import PublicQuantile
from adamix_kernels.nn.checks import replace_batch_norm
from adamix_kernels.nn.engine import DPEngine
from adamix_kernels.nn.errors import PrivacyError
from adamix_kernels.nn.sampler import PoissonSampler, SamplingEvent, pad_batch

__all__ = [
    "DPEngine",
    "PoissonSampler",
    "PrivacyError",
    "PublicQuantile",
    "SamplingEvent",
    "pad_batch",
    "replace_batch_norm",
]
