"""Attention to own and reference tokens against its definition, computed in full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emt.backbones.wan21.attention import attention_with_reference


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor,
    reference_value: Tensor,
    bias: Tensor,
    frames: int,
    neighbours: int | None,
) -> Tensor:
    """Every weight, of own and reference tokens, and the weighted mean of the values."""
    tokens, channels = query.shape[2:]
    own = query @ key.mT / channels**0.5
    reference = query @ reference_key.mT / channels**0.5 + bias.unsqueeze(2)
    if neighbours is not None:
        frame = torch.arange(tokens) // (tokens // frames)
        reference = reference.masked_fill((frame[:, None] - frame).abs() > neighbours, -torch.inf)
    weights = torch.cat([own, reference], dim=-1).softmax(-1)
    return weights @ torch.cat([value, reference_value], dim=2)


def tensors(batch: int, heads: int, frames: int, patches: int, channels: int, seed: int, spread: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, heads, frames * patches, channels)
    five = [torch.randn(shape, generator=g) * spread for _ in range(5)]
    return *five, torch.randn(shape[:3], generator=g) * 3 * spread


sizes = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.sampled_from([8, 16, 24])
)


@given(size=sizes, neighbours=st.none() | st.integers(0, 6), seed=st.integers(0, 9), gradients=st.booleans())
@settings(max_examples=60, deadline=None)
def test_it_is_what_its_definition_says(size, neighbours, seed, gradients):
    given = tensors(*size, seed)
    with torch.set_grad_enabled(gradients):
        got = attention_with_reference(*given, size[2], neighbours)
    torch.testing.assert_close(got, by_definition(*given, size[2], neighbours), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("neighbours", [None, 0, 1])
def test_gradients_are_those_of_the_definition(neighbours):
    given = [t.requires_grad_() for t in tensors(2, 2, 4, 3, 8, seed=1)]
    weight = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad((attention_with_reference(*given, 4, neighbours) * weight).sum(), given)
    expected = torch.autograd.grad((by_definition(*given, 4, neighbours) * weight).sum(), given)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("neighbours", [None, 0, 1])
@pytest.mark.parametrize("spread", [0.01, 30.0])
@torch.no_grad()
def test_sharp_and_flat_attention_stay_finite(neighbours, spread):
    given = tensors(1, 2, 4, 3, 16, seed=3, spread=spread)
    got = attention_with_reference(*given, 4, neighbours)
    torch.testing.assert_close(got, by_definition(*given, 4, neighbours), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("neighbours", [None, 1])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_its_digits(neighbours, gradients, dtype):
    given = tensors(1, 2, 5, 4, 16, seed=4)
    with torch.set_grad_enabled(gradients):
        got = attention_with_reference(*(t.to(dtype) for t in given), 5, neighbours)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), by_definition(*given, 5, neighbours), atol=6e-2, rtol=0)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return out


@pytest.mark.parametrize("neighbours", [None, 0, 1])
@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_is_as_large_as_tokens_by_tokens(neighbours, gradients):
    given = tensors(1, 1, 6, 128, 8, seed=5)
    tokens = given[0].shape[2]
    with torch.set_grad_enabled(gradients), Largest() as largest:
        attention_with_reference(*(t.requires_grad_(gradients) for t in given), 6, neighbours)
    assert largest.elements < tokens**2 / 10
