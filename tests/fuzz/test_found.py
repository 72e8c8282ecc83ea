"""What fuzzing found once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import adamix_kernels as kernels
from adamix_kernels import Noise, use_backend

IDS, ROWS = torch.tensor([[0, 1]]), torch.ones(1, 2, 3)
X = torch.ones(2, 3)


def conv(**settings: Any) -> Any:
    return kernels.conv_grad_sample(torch.ones(1, 1, 4), torch.ones(1, 1, 4), **{"kernel_size": (1,), **settings})


def no_channels(**settings: Any) -> Any:
    return kernels.conv_norm_sq(torch.ones(1, 0, 4), torch.ones(1, 0, 4), **{"kernel_size": (1,), **settings})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.clip_coef(X[:, 0], [1]), "max_grad_norm is list; pass a number or a scalar"),
        (lambda: kernels.clip_coef(X[:, 0], 1j), "max_grad_norm is complex"),
        (lambda: kernels.clip_coef(X[:, 0], 10**400), "max_grad_norm is an int beyond"),
        (lambda: kernels.clip_coef(X[:, 0], torch.tensor(1.0).to_sparse()), "max_grad_norm is a .*sparse"),
        (lambda: kernels.clip_sum_noise(X, 1.0, torch.ones(2)), "noise_multiplier is Tensor; pass a number"),
        (lambda: kernels.clip_sum_noise(X, 2, 1e308, Noise()), "noise_multiplier is 1e.308; times max_grad_norm"),
        (lambda: kernels.add_gaussian_noise_(X, torch.tensor(1j), Noise()), "std is a torch.complex64"),
        (lambda: kernels.add_gaussian_noise_(X[:, :1].expand(2, 3), 1.0, Noise()), "tensor is expanded"),
        (lambda: kernels.norm_quantile(X[:, 0], None), "q is NoneType; pass a number"),
        (lambda: kernels.subspace_basis(X, rank=0.5), "rank is 0.5; pass a number of directions"),
        (lambda: kernels.subspace_basis(X, energy="x"), "energy is str; pass a number"),
        (lambda: kernels.linear_norm_sq(X, X, method=torch.ones(2)), "method is tensor"),
        (lambda: kernels.embedding_clip_sum(IDS, ROWS, torch.ones(1), None), "num_embeddings is None; pass an int"),
        (lambda: kernels.embedding_clip_sum(IDS, ROWS, torch.ones(1), 2**70), r"num_embeddings is 1180\d+; pass"),
        (lambda: conv(padding=10**60), "padding is 10+; pass an int"),
        (lambda: conv(padding=torch.ones(2)), "padding is tensor"),
        (lambda: no_channels(groups=10**400), "groups is 10+; expected a divisor of I=0 and of O=0, at most 1"),
        (lambda: no_channels(groups=2**40), "groups is 1099511627776; expected"),
        (lambda: kernels.grid_for(None, 1.0), "max_grad_norm is NoneType; pass a number"),
        (lambda: kernels.grid_for(1.0, torch.ones(2)), "std is Tensor; pass a number"),
    ],
)
def test_a_message_names_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_axes_of_size_0(backend: str) -> None:
    with use_backend(backend):
        assert kernels.embedding_clip_sum(IDS, ROWS[..., :0], torch.ones(1), 2).shape == (2, 0)
        for inputs, outputs in ((0, 2), (2, 0), (0, 0)):
            out = kernels.conv_grad_sample(torch.ones(3, inputs, 4), torch.ones(3, outputs, 4), (1,), bias=True)
            assert out.weight.shape == (3, outputs, inputs, 1) and out.bias.shape == (3, outputs)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_whole_numbers_beyond_64_bits(backend: str) -> None:
    huge = 2**70
    with use_backend(backend):
        assert kernels.clip_coef(X[:, 0], huge).tolist() == [1.0, 1.0]
        noise = [kernels.add_gaussian_noise_(torch.zeros(9), std, Noise(seed=1)) for std in (huge, float(huge))]
        assert torch.equal(*noise) and noise[0].all()
        for limit in (torch.tensor(1.0), 1, 2**70):
            assert kernels.clip_sum_noise(X, limit, huge, Noise()).sum.all()
        with pytest.raises(ValueError, match=r"times max_grad_norm \d+ it is infinite"):
            kernels.clip_sum_noise(X, 2**1000, huge, Noise())
