"""A diffusion transformer's norms, rotation and extended attention: kernels against float64, and compiled for GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import CAPABILITIES, compiled, kernel_test, needs_triton, poisoned_memory
from torch import Tensor

from emt_kernels import extend_attention as extending
from emt_kernels import modulated_norm as norms
from emt_kernels import rotated_norm as rotation
from emt_kernels.extend_attention import extend_attention, extend_attention_reference
from emt_kernels.modulated_norm import gated_sum, gated_sum_reference, norm_of_sum, norm_of_sum_reference
from emt_kernels.rotated_norm import rotated_norm, rotated_norm_reference

few = settings(max_examples=12, deadline=None, derandomize=True)
dtypes = st.sampled_from(["bfloat16", "float16", "float32"])
sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40))  # batch, tokens, channels


class Draw:
    """Normal values of a shape, on a device."""

    def __init__(self, device: str, dtype: str, seed: int = 0) -> None:
        self.device, self.dtype = device, getattr(torch, dtype)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) + mean).to(self.device, dtype or self.dtype)


def assert_rounded(ours: Tensor, exact: Tensor, roundings: float = 1.0) -> None:
    """Equal to within roundings to the type of `ours`, and what arithmetic in float32 adds."""
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=roundings * eps, atol=2e-5 + roundings * eps / 4)


# ---------------------------------------------------------------------------------------------------- norm_of_sum


@kernel_test
@given(size=sizes, dtype=dtypes, gated=st.booleans(), modulated=st.booleans(), added=st.booleans(), mean=st.just(3.0))
@few
def test_norm_of_any_sum(device, size, dtype, gated, modulated, added, mean) -> None:
    draw, (batch, _, channels) = Draw(device, dtype), size
    x, other = draw(*size, mean=mean), draw(*size) if added else None
    vectors = draw(batch, 6, channels, dtype=torch.float32)  # as a block has them: rows of one tensor
    gate = vectors[:, 2] if gated and added else None
    scale, shift = (vectors[:, 1], vectors[:, 0]) if modulated else (vectors[:1, 1], vectors[:1, 0])
    with poisoned_memory():
        total, y = norms.launch(x, other, gate, scale, shift, 1e-5, modulated)
    wide = [t if t is None else t.double() for t in (scale, shift, other, gate)]
    exact, _ = norm_of_sum_reference(x.double(), 1e-5, *wide, modulated)
    assert_rounded(total, exact)
    if channels > 1:  # of one channel it is the offset alone, and what is left of a mean over a root of eps
        _, expected = norm_of_sum_reference(total.double(), 1e-5, *wide[:2], None, None, modulated)
        assert y.dtype == x.dtype
        assert_rounded(y, expected, 2)


@kernel_test
@given(size=sizes, dtype=dtypes, gated=st.booleans(), dense=st.booleans())
@few
def test_any_gated_sum(device, size, dtype, gated, dense) -> None:
    draw = Draw(device, dtype)
    x, added = draw(*size), draw(*size)
    if not dense:
        x, added = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, added))
    gate = draw(size[0], size[2], dtype=torch.float32) if gated else None
    with poisoned_memory():
        total, _ = norms.launch(x, added, gate)
    assert_rounded(total, gated_sum_reference(x.double(), added.double(), gate if gate is None else gate.double()))


@kernel_test
def test_rows_of_one_value_are_their_shift(device) -> None:
    x = torch.full((1, 3, 24), 1000.0, device=device)
    shift = torch.arange(24.0, device=device)[None]
    _, y = norms.launch(x, scale=torch.ones_like(shift), shift=shift, eps=1e-6, modulated=True)
    torch.testing.assert_close(y, shift.expand(1, 3, 24), atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------------- rotated_norm


@kernel_test
@given(
    heads=st.integers(1, 3),
    pairs=st.integers(1, 6),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 9),
    dtype=dtypes,
    added=st.booleans(),
    part=st.integers(0, 2),
)
@few
def test_any_rotated_norm(device, heads, pairs, batch, tokens, dtype, added, part) -> None:
    """Of a part of a projection to query, key and value together, and with an addition."""
    draw, channels = Draw(device, dtype), 2 * heads * pairs
    x = draw(batch, tokens, 3 * channels, mean=0.5)[..., part * channels : (part + 1) * channels]
    weight, other = draw(channels), draw(batch, tokens, channels) if added else None
    angle = 7 * draw(tokens, pairs, dtype=torch.float32)
    with poisoned_memory():
        y = rotation.launch(x, weight, 1e-6, angle.cos(), angle.sin(), other)
    wide = (t if t is None else t.double() for t in (angle.cos(), angle.sin(), other))
    exact = rotated_norm_reference(x.double(), weight.double(), 1e-6, *wide)
    assert (y.dtype, y.is_contiguous()) == (x.dtype, True)
    assert_rounded(y, exact)


def test_a_rotation_keeps_lengths_and_turns_by_its_angles() -> None:
    """By complex numbers: a pair of channels is one, and is multiplied by e^{i·angle}."""
    draw = Draw("cpu", "float32")
    x, angle = draw(2, 5, 3 * 8), draw(5, 4)
    y = rotated_norm_reference(x, torch.ones(24), 0.0, angle.cos(), angle.sin())
    plain = torch.view_as_complex((x / x.square().mean(-1, keepdim=True).sqrt()).view(2, 5, 3, 4, 2))
    expected = torch.view_as_real(plain * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(2)
    torch.testing.assert_close(y, expected)


# ----------------------------------------------------------------------------------------------- extend_attention


@dataclass(frozen=True)
class Attended:
    """Inputs of `extend_attention` in the dtype under test, and its output in float64."""

    narrow: tuple[Tensor, ...]
    exact: Tensor


def attended(
    draw: Draw, batch: int, references: int, heads: int, frames: int, patches: int, near: int | None, spread: float = 1
) -> Attended:
    """An attention to all keys at once, with tokens first in memory as projections leave them."""
    channels, tokens = 16, frames * patches

    def tokens_first(n: int) -> Tensor:
        return draw(n, tokens, heads, channels).double().transpose(1, 2) * spread

    query, key, value = (tokens_first(batch) for _ in range(3))
    further, their_values = tokens_first(references), tokens_first(references)
    bias = (draw(batch, tokens, heads).double() * 3).transpose(1, 2)
    logits = query @ key.mT / channels**0.5
    own, own_sum = logits.softmax(-1) @ value, logits.logsumexp(-1)
    r, w = (t.repeat(batch // references, 1, 1, 1) for t in (further, their_values))
    others = query @ r.mT / channels**0.5 + bias.unsqueeze(2)
    frame = torch.arange(tokens, device=draw.device) // patches
    if near is not None:
        others = others.masked_fill((frame[:, None] - frame).abs() > near, -torch.inf)
    exact = torch.cat([logits, others], -1).softmax(-1) @ torch.cat([value, w], 2)
    own, query, further, their_values, bias = (t.to(draw.dtype) for t in (own, query, further, their_values, bias))
    return Attended((own, own_sum.float(), query, further, their_values, bias), exact)


@kernel_test
@given(
    references=st.integers(1, 2),
    heads=st.integers(1, 3),
    frames=st.integers(1, 5),
    patches=st.integers(1, 9),
    near=st.none() | st.integers(0, 5),
    dtype=st.sampled_from(["float16", "float32"]),  # blocks of bfloat16 are not interpreted
    rows=st.sampled_from([16, 32]),
    keys=st.sampled_from([16, 32]),
)
@few
def test_an_extended_attention_is_that_to_all_keys(
    device, references, heads, frames, patches, near, dtype, rows, keys
) -> None:
    case = attended(Draw(device, dtype), 2, references, heads, frames, patches, near)
    with poisoned_memory():
        out = extending.launch(*case.narrow, frames, near, rows=rows, keys=keys, warps=4)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), case.exact, atol={"float32": 2e-5, "float16": 4e-3}[dtype], rtol=0)


@kernel_test
@pytest.mark.parametrize("spread", [0.01, 30.0])
@pytest.mark.parametrize("near", [None, 0])
def test_sharp_and_flat_attention_extend_to_finite_ones(device, spread, near) -> None:
    case = attended(Draw(device, "float32"), 1, 1, 2, 3, 7, near, spread)
    out = extending.launch(*case.narrow, 3, near, rows=16, keys=16, warps=4)
    torch.testing.assert_close(out.double(), case.exact, atol=2e-4 * max(spread, 1), rtol=0)


@kernel_test
def test_keys_that_count_for_nothing_change_nothing(device) -> None:
    case = attended(Draw(device, "float32"), 1, 1, 2, 3, 7, None)
    *given, bias = case.narrow
    out = extending.launch(*given, bias - 1e4, 3, None, rows=16, keys=16, warps=4)
    assert torch.equal(out, given[0])


@kernel_test
@pytest.mark.parametrize("near", [None, 1])
def test_samples_without_further_keys_stay_as_they_are(device, near) -> None:
    case = attended(Draw(device, "float32"), 4, 2, 2, 3, 7, near)
    present = torch.tensor([False, True], device=device)
    with poisoned_memory():
        out = extending.launch(*case.narrow, 3, near, present, rows=16, keys=16, warps=4)
    assert torch.equal(out[0::2], case.narrow[0][0::2])
    torch.testing.assert_close(out[1::2].double(), case.exact[1::2], atol=2e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------- all of them


def test_without_a_gpu_they_are_their_references() -> None:
    draw = Draw("cpu", "float32")
    x, added, scale, shift, gate = draw(2, 3, 8), draw(2, 3, 8), draw(2, 8), draw(2, 8), draw(2, 8)
    given = x, 1e-6, scale, shift, added, gate
    for a, b in zip(norm_of_sum(*given), norm_of_sum_reference(*given), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(gated_sum(x, added, gate), gated_sum_reference(x, added, gate))
    given = x, draw(8), 1e-6, draw(3, 2), draw(3, 2)
    assert torch.equal(rotated_norm(*given), rotated_norm_reference(*given))
    case = attended(draw, 4, 2, 3, 4, 5, 1)
    out = extend_attention(*case.narrow, 4, 1)
    assert torch.equal(out, extend_attention_reference(*case.narrow, 4, 1))
    torch.testing.assert_close(out.double(), case.exact, atol=1e-5, rtol=1e-5)
    some = extend_attention(*case.narrow, 4, 1, torch.tensor([True, False]))
    assert torch.equal(some[0::2], out[0::2])
    assert torch.equal(some[1::2], case.narrow[0][1::2])


def test_what_does_not_fit_is_named() -> None:
    draw = Draw("cpu", "float32")
    x, v = draw(2, 3, 8), draw(2, 8)
    with pytest.raises(ValueError, match=r"added has shape \(2, 3, 4\), expected \(2, 3, 8\)"):
        gated_sum(x, x[..., :4], v)
    with pytest.raises(ValueError, match=r"gate has shape \(3, 8\), expected \(2, 8\)"):
        gated_sum(x, x, draw(3, 8))
    with pytest.raises(ValueError, match=r"shift has shape \(2, 4\), expected \(2, 8\)"):
        norm_of_sum(x, 1e-6, v, v[:, :4])
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), expected \(8,\)"):
        rotated_norm(x, v[0, :4], 1e-6, draw(3, 2), draw(3, 2))
    with pytest.raises(ValueError, match=r"cosines has shape \(3, 3\)"):
        rotated_norm(x, v[0], 1e-6, draw(3, 3), draw(3, 2))
    with pytest.raises(ValueError, match=r"sines has shape \(2, 2\)"):
        rotated_norm(x, v[0], 1e-6, draw(3, 2), draw(2, 2))
    own, own_sum, query, key, value, bias = attended(draw, 2, 2, 1, 2, 3, None).narrow
    with pytest.raises(ValueError, match=r"own_sum has shape \(2, 1, 5\), expected \(2, 1, 6\)"):
        extend_attention(own, own_sum[..., :5], query, key, value, bias, 2)
    with pytest.raises(ValueError, match=r"key has shape \(3, 1, 6, 16\), expected \(2, 1, 6, 16\), or a divisor"):
        extend_attention(own, own_sum, query, draw(3, 1, 6, 16), draw(3, 1, 6, 16), bias, 2)
    with pytest.raises(ValueError, match=r"4 frames do not divide the tokens of query, shape \(2, 1, 6, 16\)"):
        extend_attention(own, own_sum, query, key, value, bias, 4)
    with pytest.raises(ValueError, match=r"present has shape \(3,\), expected \(2,\), or a divisor of it"):
        extend_attention(own, own_sum, query, key, value, bias, 2, present=torch.ones(3, dtype=torch.bool))


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_norms_compile_for_real_gpus(capability: int) -> None:
    narrow = dict.fromkeys(("x", "added", "total", "out", "weight"), "bf16")
    wide = dict.fromkeys(("gate", "scale", "shift", "cosines", "sines"), "fp32")
    for kernel, constants in (
        (norms._norm_of_sum, {"GATE": True, "NORM": True, "MODULATED": True}),
        (rotation._rotated_norm, {}),
    ):
        names = [p.name for p in kernel.params]
        pointers = {name: kind for name, kind in (narrow | wide).items() if name in names}
        constants |= {"EPS": 1e-6, "ADDED": True, "ROWS": 2, "LANES": 2048}
        assert compiled(kernel, pointers, constants, capability, num_warps=4).asm["cubin"]


@needs_triton
@pytest.mark.parametrize("near", [False, True])
def test_attention_compiles_for_hopper_to_its_matmuls(near: bool) -> None:
    blocks = dict.fromkeys(("query", "key", "value"), "tensordesc<bf16[128, 128]>")
    pointers = dict.fromkeys(("bias", "own", "out"), "bf16") | {"own_sum": "fp32", "present": "u8"}
    constants = {"NEAR": near, "SOME": True, "ROWS": 128, "KEYS": 128, "CHANNELS": 128}
    kinds = blocks | {"scale": "fp32"}
    made = compiled(extending._extend_attention, pointers, constants, 90, num_warps=8, num_stages=2, kinds=kinds)
    assert made.asm["cubin"]
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert made.metadata.shared < 228 * 2**10
