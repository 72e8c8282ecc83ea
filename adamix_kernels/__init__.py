"""Accelerated differentially private gradients: per-sample norms, clipping, summation and Gaussian noise."""

from adamix_kernels import cuda as _cuda  # noqa: F401  attaches the CUDA kernels, loads nothing yet
from adamix_kernels import native as _native  # noqa: F401  attaches the compiled kernels, loads nothing yet
from adamix_kernels import native_factored as _native_factored  # noqa: F401  likewise
from adamix_kernels import native_grid as _native_grid  # noqa: F401  likewise
from adamix_kernels import native_layers as _native_layers  # noqa: F401  likewise
from adamix_kernels import triton as _triton  # noqa: F401  likewise
from adamix_kernels.nn import (
    DPEngine,
    PoissonSampler,
    PrivacyError,
    PublicQuantile,
    SamplingEvent,
    pad_batch,
    replace_batch_norm,
)
from adamix_kernels.ops.clip import ClippedSum, clip_coef, clip_sum, clip_sum_noise
from adamix_kernels.ops.conv import ConvSum, conv_clip_sum, conv_norm_sq
from adamix_kernels.ops.conv_clip import ConvClippedSum, conv_norm_clip_sum
from adamix_kernels.ops.conv_grad import ConvGrad, conv_grad_sample
from adamix_kernels.ops.embedding import embedding_clip_sum, embedding_norm_sq
from adamix_kernels.ops.grid import grid_clip_sum, grid_for, grid_release
from adamix_kernels.ops.head import HeadSum, softmax_head_clip_sum_noise
from adamix_kernels.ops.head_variants import MixedHeadSum, softmax_head_coordinates, softmax_head_mixed_sum
from adamix_kernels.ops.linear import LinearSum, linear_clip_sum, linear_norm_sq
from adamix_kernels.ops.noise import FastNoiseWarning, Noise, add_gaussian_noise_
from adamix_kernels.ops.norm import grad_norm_sq
from adamix_kernels.ops.quantile import norm_quantile
from adamix_kernels.ops.scale_shift import ScaleShiftSum, scale_shift_clip_sum, scale_shift_norm_sq
from adamix_kernels.ops.subspace import lift, project, subspace_basis
from adamix_kernels.private import OutsideGuaranteeWarning, Private
from adamix_kernels.spec import BackendError, backends, use_backend

__all__ = [
    "BackendError",
    "ClippedSum",
    "ConvClippedSum",
    "ConvGrad",
    "ConvSum",
    "DPEngine",
    "FastNoiseWarning",
    "HeadSum",
    "LinearSum",
    "MixedHeadSum",
    "Noise",
    "OutsideGuaranteeWarning",
    "PoissonSampler",
    "PrivacyError",
    "Private",
    "PublicQuantile",
    "SamplingEvent",
    "ScaleShiftSum",
    "add_gaussian_noise_",
    "backends",
    "clip_coef",
    "clip_sum",
    "clip_sum_noise",
    "conv_clip_sum",
    "conv_grad_sample",
    "conv_norm_clip_sum",
    "conv_norm_sq",
    "embedding_clip_sum",
    "embedding_norm_sq",
    "grad_norm_sq",
    "grid_clip_sum",
    "grid_for",
    "grid_release",
    "lift",
    "linear_clip_sum",
    "linear_norm_sq",
    "norm_quantile",
    "pad_batch",
    "project",
    "replace_batch_norm",
    "scale_shift_clip_sum",
    "scale_shift_norm_sq",
    "softmax_head_clip_sum_noise",
    "softmax_head_coordinates",
    "softmax_head_mixed_sum",
    "subspace_basis",
    "use_backend",
]
