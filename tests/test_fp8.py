"""Products in float8: quantization against float64, kernels against references, the network against itself."""

from __future__ import annotations

import copy
import subprocess
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import CAPABILITIES, compiled, kernel_test, needs_triton
from program import console
from torch import Tensor

from emt.backbones.sd15.fp8 import Fp8Linear, is_faster, scaled_matmul, scaled_matmul_reference
from emt.backbones.sd15.random_model import draw_weights
from emt.backbones.sd15.unet import MotionTransferUNet
from emt.device import check_fp8
from emt.errors import EmtError
from emt.features import MotionFeatures
from emt_kernels import quantize as quantize_module
from emt_kernels.geglu import geglu_reference
from emt_kernels.layer_norm import layer_norm_reference
from emt_kernels.quantize import LARGEST, SMALLEST, Quantized, quantize_rows_reference
from emt_kernels.selection import interpreted

few = settings(max_examples=6, deadline=None, derandomize=True)
rows = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 70))
seeds = st.integers(0, 2**16)


def random(seed: int, device: str, *shape: int, scale: float = 2.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(device, torch.float16)


def assert_quantized(rows: Quantized, exact: Tensor) -> None:
    """Every number is within half a step of float8 of the exact one, and rows use the range of it.

    A step is at most an eighth of a number, and 2⁻⁹ of the scale for the smallest. Triton's interpreter cuts those off,
    and halves what it should round up to a power of two.
    """
    largest = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(rows.scale.double(), largest.clamp(min=SMALLEST) / LARGEST, rtol=2e-3, atol=1e-15)
    scaled = exact / rows.scale
    bound = exact.abs() / 16 + (2**-7 if interpreted() else 2**-10) * rows.scale.double() + 2e-3 * largest
    if interpreted():
        bound += torch.where(torch.frexp(scaled).mantissa.abs() > 0.95, exact.abs() / 2, 0.0)
    excess = ((rows.dequantize().double() - exact).abs() / bound.clamp(min=1e-30)).max()
    assert excess <= 1, f"{excess:.2f} times the bound"


# ------------------------------------------------------------------------------------------------------------ kernels


@kernel_test
@given(shape=rows, seed=seeds, scale=st.sampled_from([1e-4, 1.0, 3000.0]))
@few
def test_quantize_rows(device: str, shape: tuple[int, ...], seed: int, scale: float) -> None:
    x = random(seed, device, *shape, scale=scale).clamp(-65000, 65000)
    assert_quantized(Quantized(*torch.ops.emt.quantize_rows(x)), x.double())


@kernel_test
@given(shape=rows, seed=seeds)
@few
def test_geglu_quantized(device: str, shape: tuple[int, ...], seed: int) -> None:
    x = random(seed, device, *shape[:-1], 2 * shape[-1])
    assert_quantized(Quantized(*torch.ops.emt.geglu_quantized(x)), geglu_reference(x.double()))


@kernel_test
@given(shape=rows, frames=st.integers(1, 3), seed=seeds, parts=st.tuples(*[st.booleans()] * 4))
@few
def test_layer_norm_quantized(
    device: str, shape: tuple[int, ...], frames: int, seed: int, parts: tuple[bool, ...]
) -> None:
    channels = shape[-1] + 1
    x = random(seed, device, shape[0], frames, shape[1], channels)
    residual = random(seed + 1, device, *x.shape) if parts[0] else None
    positions = random(seed + 2, device, frames, channels) if parts[1] else None
    weight, bias = random(seed + 3, device, 2, channels, scale=1.0)
    shift = random(seed + 4, device, channels) if parts[3] else None
    values, scale, *others = torch.ops.emt.layer_norm_quantized(
        x, weight, bias, 1e-5, positions, residual, parts[2], shift
    )
    if parts[2]:
        exact = others.pop()
    total = x if residual is None else others.pop()
    assert not others
    torch.testing.assert_close(total, x if residual is None else x + residual)
    wide = [None if t is None else t.double() for t in (weight, bias, positions, shift)]
    normalized = layer_norm_reference(total.double(), wide[0], wide[1], 1e-5, wide[2], None, False, wide[3])[2]
    assert_quantized(Quantized(values, scale), normalized)
    if parts[2]:
        torch.testing.assert_close(exact.double(), normalized, rtol=2e-3, atol=2e-3)


@kernel_test
def test_what_is_not_finite_stays_so_and_rows_of_zeros_are_zeros(device: str) -> None:
    x = torch.zeros(3, 40, dtype=torch.float16, device=device)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    dequantized = Quantized(*torch.ops.emt.quantize_rows(x)).dequantize()
    assert torch.isnan(dequantized[0]).all()
    assert not torch.isfinite(dequantized[1, 5])
    assert (dequantized[2] == 0).all()


@needs_triton
@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c >= 89])
def test_kernels_compile_for_gpus_that_have_float8(capability: int) -> None:
    outputs = {"values": "fp8e4nv", "scale": "fp32"}
    constants: dict[str, Any] = {"LARGEST": LARGEST, "SMALLEST": SMALLEST, "ROWS": 1, "LANES": 2048}
    halves = dict.fromkeys(("x", "weight", "bias", "positions", "residual", "shift", "total", "exact"), "fp16")
    norm = {"EPS": 1e-5, "POSITIONS": True, "RESIDUAL": True, "SHIFT": True, "EXACT": True}
    for name, pointers, more in (
        ("_quantize_rows_kernel", {"x": "fp16"}, {}),
        ("_geglu_quantized_kernel", {"x": "fp16"}, {}),
        ("_layer_norm_quantized_kernel", halves, norm),
    ):
        kernel = getattr(quantize_module, name)
        assert compiled(kernel, pointers | outputs, constants | more, capability, num_warps=4).asm["cubin"]


# ----------------------------------------------------------------------------------------------------------- products


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)), seed=seeds, biased=st.booleans())
@few
def test_a_product_is_within_5_percent_of_float64(shape: tuple[int, int, int], seed: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, outputs, inputs = shape[0], 16 * shape[1], 16 * shape[2]
    # Rows and channels of very different sizes, which one scale for all could not hold.
    x = torch.randn(tokens, inputs, generator=generator) * torch.logspace(-4, 3, tokens)[:, None]
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-2, 2, outputs)[:, None]
    bias = torch.randn(outputs, generator=generator) if biased else None
    product = x.double() @ weight.double().t()
    ours = Fp8Linear(weight, bias)(x).double() - (0 if bias is None else bias.double())
    assert ((ours - product).norm(dim=1) / product.norm(dim=1)).median() < 5e-2
    assert ((ours - product).norm(dim=0) / product.norm(dim=0)).median() < 6e-2


def test_the_emulated_product_is_pytorchs_own() -> None:
    x, weight = (quantize_rows_reference(random(i, "cpu", 32, 48).float()) for i in range(2))
    try:
        arguments = (x.values, weight.values.t(), x.scale, weight.scale.t().contiguous())
        theirs = torch._scaled_mm(*arguments, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no float8 product on the CPU: {error}")
    ours = scaled_matmul_reference(x.values, x.scale, weight.values, weight.scale.t(), None, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gpus_product_is_the_emulated_one(dtype: torch.dtype, biased: bool) -> None:
    gpu_with_fp8()
    x, weight = (quantize_rows_reference(random(i, "cuda", 160, 320).float()) for i in range(2))
    bias = random(3, "cuda", 160).to(dtype) if biased else None
    arguments = x.values, x.scale, weight.values, weight.scale.t().contiguous(), bias, dtype
    torch.testing.assert_close(scaled_matmul(*arguments), scaled_matmul_reference(*arguments), rtol=2e-2, atol=0.2)


def test_only_products_that_gain_are_in_float8() -> None:
    assert is_faster(10240, 1280)  # bound by arithmetic
    assert is_faster(320, 1280)  # half the traffic
    assert not is_faster(960, 320, exact=True)  # written twice, to be read once


# -------------------------------------------------------------------------------------------------------- the network


class Case:
    """A small network, and a guided step of it."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        sizes = {"block_out_channels": (32, 64), "cross_attention_dim": 32, "norm_num_groups": 8, "layers_per_block": 1}
        self.unet = MotionTransferUNet(**sizes).eval()
        generator = torch.Generator().manual_seed(0)
        draw_weights(self.unet, generator)
        self.unet.to(device, dtype)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.sample, self.text, self.reference = make(2, 4, 4, 8, 8), make(2, 7, 32), make(1, 4, 4, 8, 8)
        self.timestep = torch.tensor(601, device=device)

    @torch.no_grad()
    def motion(self) -> MotionFeatures:
        return self.unet.encode_reference(self.reference, self.timestep, self.text[:1])

    @torch.no_grad()
    def step(self, motion: MotionFeatures | None) -> Tensor:
        return self.unet(self.sample, self.timestep, self.text, motion).float()


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def everything(outputs: int, inputs: int, exact: bool) -> bool:
    return True


def in_float8(case: Case, **options: Any) -> Case:
    case = copy.deepcopy(case)
    assert case.unet.use_fp8(choice=everything, **options) > 0
    return case


@pytest.mark.parametrize("reference", [False, True])
def test_a_step_is_close_to_the_exact_one(case: Case, reference: bool) -> None:
    motion = case.motion() if reference else None
    exact = case.step(motion)
    feed_forward = difference(in_float8(case, attention=False).step(motion), exact)
    both = difference(in_float8(case).step(motion), exact)
    assert 1e-3 < feed_forward < 5e-2
    assert 1e-3 < both < 8e-2  # of a network four layers deep and 32 channels wide


def test_the_reference_pass_works_and_is_close(case: Case) -> None:
    ours, theirs = in_float8(case).motion(), case.motion()
    for path, features in theirs.layers.items():
        for a, b in zip(ours.layers[path], features, strict=True):
            assert difference(a, b) < 8e-2


def test_doing_it_again_changes_nothing(case: Case) -> None:
    ours = in_float8(case)
    count, before = ours.unet.use_fp8(choice=everything), ours.step(None)
    assert ours.unet.use_fp8(choice=everything) == count
    assert torch.equal(ours.step(None), before)


def test_what_is_left_in_full_can_still_be_fused(case: Case) -> None:
    """As on a GPU, before or after; nothing else may come of it."""
    ours = in_float8(case, attention=False)
    before = ours.step(None)
    ours.unet.fuse_projections()
    torch.testing.assert_close(ours.step(None), before)
    assert ours.unet.use_fp8(choice=everything) > 0
    both = ours.step(None)
    ours.unet.fuse_projections()
    assert torch.equal(ours.step(None), both)


def test_layers_that_do_not_gain_stay_as_they_are(case: Case) -> None:
    ours = copy.deepcopy(case)
    assert ours.unet.use_fp8(choice=lambda outputs, inputs, exact: False) == 0
    assert torch.equal(ours.step(None), case.step(None))


@pytest.mark.gpu
def test_a_step_on_the_gpu_in_a_graph() -> None:
    gpu_with_fp8()
    exact = Case("cuda", torch.float16)
    motion = exact.motion()
    ours = in_float8(exact)
    eager = ours.step(motion)
    assert 1e-3 < difference(eager, exact.step(motion)) < 8e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ours.step(motion)
    graph.replay()
    assert torch.equal(output, eager)


def gpu_with_fp8() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA GPU")
    try:
        check_fp8("cuda")
    except EmtError as error:
        pytest.skip(error.problem)


# -------------------------------------------------------------------------------------------------------- the program


def test_a_device_without_float8_says_what_is_allowed() -> None:
    with pytest.raises(EmtError, match="fp8 needs an NVIDIA GPU") as raised:
        check_fp8("cpu")
    assert "fp16" in raised.value.hint


def test_a_gpu_without_float8_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    with pytest.raises(EmtError, match=r"8\.9 or newer, RTX 3090 has 8\.6"):
        check_fp8("cuda:0")


@pytest.mark.parametrize("other", [("--memory", "low"), ("--engine", "somewhere")])
def test_what_does_not_go_together_is_bad_usage(tmp_path, other) -> None:
    done: subprocess.CompletedProcess[str] = console(
        tmp_path, "transfer", "x.mp4", "--prompt", "x", "--precision", "fp8", *other
    )
    assert done.returncode == 2
    assert "exclude each other" in done.stderr
