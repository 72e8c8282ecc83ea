"""Private training of any torch model: rules for the functions a parameter is used by, and the engine."""

from adamix_kernels.nn.checks import replace_batch_norm
from adamix_kernels.nn.engine import DPEngine
from adamix_kernels.nn.errors import PrivacyError

__all__ = ["DPEngine", "PrivacyError", "replace_batch_norm"]
