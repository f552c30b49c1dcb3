"""Upsampling and convolution as four small convolutions: against float64, and compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import compiled, kernel_test, needs_triton, poisoned_memory

from emt.backbones.sd15 import passes
from emt_kernels import upsample_conv as module
from emt_kernels.upsample_conv import Plan, phase_weights, upsample_conv_reference

few = settings(max_examples=8, deadline=None, derandomize=True)


def tensors(shape: tuple[int, int, int, int], outputs: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (outputs, shape[1], 3, 3), (outputs,))
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def test_the_four_convolutions_are_the_one() -> None:
    """In float64, with PyTorch's own convolutions in the places of the kernel."""
    x, weight, bias = tensors((2, 3, 4, 5), 6, torch.float64, "cpu")
    phases = phase_weights(weight).double()
    found = torch.empty(2, 6, 8, 10, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for phase in range(4):
        a, b = divmod(phase, 2)
        kernel = phases[phase].unflatten(0, (2, 2)).permute(3, 2, 0, 1)
        found[:, :, a::2, b::2] = torch.nn.functional.conv2d(padded[:, :, a : a + 5, b : b + 6], kernel, bias)
    torch.testing.assert_close(found, upsample_conv_reference(x, weight, bias), rtol=1e-5, atol=1e-5)


@kernel_test
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 6), st.integers(1, 6)),
    outputs=st.integers(1, 40),
    dtype=st.sampled_from(["float16", "float32"]),
    channels_last=st.booleans(),
)
@few
def test_any_shape(
    device: str, shape: tuple[int, int, int, int], outputs: int, dtype: str, channels_last: bool
) -> None:
    x, weight, bias = tensors(shape, outputs, getattr(torch, dtype), device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    phases = phase_weights(weight)
    with poisoned_memory():
        y = module.launch(x, phases, bias, Plan(16, 16, 16, 4, 2))
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = upsample_conv_reference(*(t.double() for t in (x, weight, bias)))
    terms = upsample_conv_reference(*(t.double().abs() for t in (x, weight, bias)))
    eps = torch.finfo(y.dtype).eps  # of the result, and of weights that were added
    assert ((y.double() - exact).abs() <= eps * (exact.abs() + terms) + 1e-5 * terms).all()


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_kernel_adds_weights_to_the_bit(device: str, channels_last: bool, dtype: torch.dtype) -> None:
    _, weight, _ = tensors((1, 40, 1, 1), 70, dtype, device)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    with poisoned_memory():
        assert torch.equal(module.add_phases(weight), phase_weights(weight))


@kernel_test
@pytest.mark.parametrize("shape", [(2, 20, 3, 5), (1, 4, 1, 1)])
def test_the_operator_is_the_reference(device: str, shape: tuple[int, int, int, int]) -> None:
    x, weight, bias = tensors(shape, 24, torch.float16, device)
    found, wanted = torch.ops.emt.upsample_conv(x, weight, bias), upsample_conv_reference(x, weight, bias)
    assert found.stride() == torch.empty_like(wanted, memory_format=torch.channels_last).stride()
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-2, atol=2e-2)
    torch.library.opcheck(torch.ops.emt.upsample_conv, (x, weight, bias), test_utils="test_faketensor")


def test_a_tile_fits_into_the_gpu() -> None:
    for inputs in (256, 512, 640, 1280):
        for shared in (99 << 10, 163 << 10, 227 << 10):  # of compute capability 8.6 and 8.9, 8.0, 9.0
            assert module.plan(inputs, 2, shared).shared_bytes(2) <= shared
    assert module.plan(1280, 2, 227 << 10) == Plan(256, 128, 64, 8, 3)
    assert module.plan(256, 2, 227 << 10) == Plan(128, 256, 64, 8, 3)


def test_without_a_gpu_it_is_pytorchs_pair_bit_by_bit() -> None:
    x, weight, bias = tensors((2, 3, 4, 5), 6, torch.float32, "cpu")
    pair = torch.nn.functional.interpolate(x, size=(8, 10), mode="nearest")
    expected = torch.nn.functional.conv2d(pair, weight, bias, padding=1)
    assert torch.equal(module.upsample_conv(x, weight, bias), expected)


def test_the_network_uses_it_where_images_are_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = tensors((1, 4, 3, 5), 4, torch.float32, "cpu")
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    conv.weight.data, conv.bias.data = weight, bias
    calls = []
    monkeypatch.setattr(passes, "is_fused", lambda x, weight: True)
    monkeypatch.setattr(passes, "upsample_conv", lambda *given: calls.append(1) or upsample_conv_reference(*given))
    for run in (passes.Pass(), passes.FusedPass(True, 8)):
        doubled = passes.materialized(run.upsample(conv, x, torch.Size([6, 10])))
        assert torch.equal(doubled, upsample_conv_reference(x, weight, bias))
        assert passes.materialized(run.upsample(conv, x, torch.Size([5, 9]))).shape == (1, 4, 5, 9), "of an odd size"
    assert len(calls) == 2


def test_other_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(6, 3, 1, 1\)"):
        phase_weights(torch.zeros(6, 3, 1, 1))


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_addition_compiles_for_real_gpus(capability: int) -> None:
    pointers, constants = dict.fromkeys(("weight", "phases"), "fp16"), {"INPUTS": 32, "OUTPUTS": 64}
    assert compiled(module._add_phases, pointers, constants, capability, num_warps=4).asm["cubin"]


@needs_triton
@pytest.mark.parametrize(
    ("capability", "chosen"),
    [(80, Plan()), (89, module.plan(640, 2, 99 << 10)), *((90, module.plan(n, 2, 227 << 10)) for n in (256, 640))],
)
def test_it_compiles_for_real_gpus(capability: int, chosen: Plan) -> None:
    constants = {"ROWS": chosen.rows, "COLUMNS": chosen.columns, "DEPTH": chosen.depth, "GROUP": 8}
    pointers = dict.fromkeys(("x", "weight", "bias", "out"), "fp16")
    made = compiled(
        module._upsample_conv,
        pointers,
        constants,
        capability,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        multiples=("pixels", "inputs", "outputs"),
    )
    assert made.asm["cubin"]
    ptx = made.asm["ptx"]
    assert ("wgmma" if capability == 90 else "mma.sync") in ptx
    assert "cp.async" in ptx
    assert made.metadata.shared <= {80: 163, 89: 99, 90: 227}[capability] << 10
