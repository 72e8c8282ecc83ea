"""Accelerated differentially private gradients: per-sample norms, clipping, summation and Gaussian noise."""

from adamix_kernels import native as _native  # noqa: F401  attaches the compiled kernels, loads nothing yet
from adamix_kernels.ops.clip import ClippedSum, clip_coef, clip_sum, clip_sum_noise
from adamix_kernels.ops.head import HeadSum, softmax_head_clip_sum_noise
from adamix_kernels.ops.noise import Noise, add_gaussian_noise_
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.ops.quantile import norm_quantile
from adamix_kernels.ops.subspace import lift, project, subspace_basis
from adamix_kernels.spec import BackendError, backends, use_backend

__all__ = [
    "BackendError",
    "ClippedSum",
    "HeadSum",
    "Noise",
    "add_gaussian_noise_",
    "backends",
    "clip_coef",
    "clip_sum",
    "clip_sum_noise",
    "grad_norm_sq",
    "lift",
    "norm_quantile",
    "project",
    "softmax_head_clip_sum_noise",
    "subspace_basis",
    "use_backend",
]
