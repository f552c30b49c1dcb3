"""Group norm with SiLU, layer norm with positions and residual, GEGLU: kernels against float64 references."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_testing import CAPABILITIES, compiled, kernel_test, poisoned_memory
from torch import Tensor

from emt_kernels import geglu as geglu_module
from emt_kernels import group_norm_silu as group_norm_module
from emt_kernels import layer_norm as layer_norm_module
from emt_kernels.geglu import geglu, geglu_reference
from emt_kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference, plan
from emt_kernels.layer_norm import layer_norm, layer_norm_reference

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

few = settings(max_examples=12, deadline=None, derandomize=True)
dtypes = st.sampled_from(sorted(DTYPES))
seeds = st.integers(0, 2**16)


def random(seed: int, device: str, dtype: str) -> Any:
    """A function that makes normal values of a shape, times a scale, plus a mean."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, scale: float = 1, mean: float = 0) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean
        return x.to(device, DTYPES[dtype])

    return make


def assert_rounded(ours: Tensor, exact: Tensor, scale: float | Tensor = 1.0) -> None:
    """Equal to within one rounding to the type of `ours`, and what float32 arithmetic adds to it at `scale`."""
    bound = torch.finfo(ours.dtype).eps * exact.abs() + 1e-5 * scale + torch.finfo(ours.dtype).tiny
    excess = ((ours.double() - exact).abs() / bound).max().item()
    assert excess <= 1, f"{excess:.1f} times the bound"


def wide(*tensors: Tensor | None) -> list[Any]:
    return [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


# ------------------------------------------------------------------------------------------------ group_norm_silu


def in_blocks(blocks: bool) -> Any:
    """Have frames normalized block by block, however small they are, instead of as planned."""
    return mock.patch.object(group_norm_module, "plan", return_value=None) if blocks else contextlib.nullcontext()


frame_sizes = st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.tuples(st.integers(15, 24), st.integers(17, 23))


@st.composite
def group_norms(draw: st.DrawFn) -> dict[str, Any]:
    height, width = draw(frame_sizes)
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 19))
    assume(size * height * width > 1)  # PyTorch refuses to normalize a single value
    return {
        "groups": groups,
        "shape": (draw(st.integers(1, 3)), groups * size, height, width),
        "dtype": draw(dtypes),
        "silu": draw(st.booleans()),
        "shifted": draw(st.sampled_from([None, "each", "alike"])),
        "blocks": draw(st.booleans()),
        "channels_last": draw(st.booleans()),
        "seed": draw(seeds),
    }


def group_norm_inputs(case: dict[str, Any], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    make, (frames, channels, *_) = random(case["seed"], device, case["dtype"]), case["shape"]
    x = make(*case["shape"], scale=2, mean=1)
    if case["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    shifts = {
        None: lambda: None,
        "each": lambda: make(frames, channels),
        "alike": lambda: make(channels).expand(frames, -1),
    }
    return x, make(channels), make(channels), shifts[case["shifted"]]()


@kernel_test
@given(case=group_norms())
@few
def test_group_norm_silu(device: str, case: dict[str, Any]) -> None:
    x, weight, bias, shift = group_norm_inputs(case, device)
    arguments = case["groups"], 1e-5, case["silu"]
    with poisoned_memory(), in_blocks(case["blocks"]):
        y = torch.ops.emt.group_norm_silu(x, weight, bias, *arguments, shift)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    w, b = (v[:, None, None] for v in wide(weight, bias))
    exact = group_norm_silu_reference(*wide(x, weight, bias), *arguments, *wide(shift))
    normalized = group_norm_silu_reference(*wide(x, weight, bias), *arguments[:2], False, *wide(shift)) - b
    assert_rounded(y, exact, normalized.abs() + w.abs() + b.abs())


@kernel_test
@given(case=group_norms(), share=st.floats(0, 1))
@few
def test_group_norm_of_two_tensors_is_that_of_one(device: str, case: dict[str, Any], share: float) -> None:
    """Whatever divides the channels, groups and blocks of channels included."""
    x, weight, bias, shift = group_norm_inputs(case, device)
    assume(x.shape[1] > 1)
    first = 1 + round(share * (x.shape[1] - 2))
    arguments = case["groups"], 1e-5, case["silu"], shift
    with poisoned_memory(), in_blocks(case["blocks"]):
        whole = torch.ops.emt.group_norm_silu(x, weight, bias, *arguments)
        y = torch.ops.emt.group_norm_silu_of_two(x[:, :first], x[:, first:], weight, bias, *arguments)
    assert y.stride() == whole.stride()
    torch.testing.assert_close(y, whole)


@kernel_test
def test_gradients_reach_both_tensors(device: str) -> None:
    make = random(0, device, "fp32")
    x, beside = (make(2, channels, 3, 4).requires_grad_() for channels in (4, 8))
    weight, bias = make(12), make(12)
    y = group_norm_silu(x, weight, bias, 3, 1e-5, True, None, beside)
    expected = group_norm_silu_reference(x, weight, bias, 3, 1e-5, True, None, beside)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), (x, beside)), torch.autograd.grad(expected.sum(), (x, beside))
    ):
        torch.testing.assert_close(ours, theirs)


@kernel_test
@given(case=group_norms())
@few
def test_group_norm_silu_gradients(device: str, case: dict[str, Any]) -> None:
    inputs = group_norm_inputs(case, device)
    present = [t.requires_grad_() for t in inputs if t is not None]
    x, weight, bias, shift = inputs
    arguments = case["groups"], 1e-5, case["silu"]
    grad = random(case["seed"] + 1, device, case["dtype"])(*case["shape"])
    with poisoned_memory():
        y = torch.ops.emt.group_norm_silu(x, weight, bias, *arguments, shift)
        ours = torch.autograd.grad(y, present, grad)
    exact_inputs = wide(*inputs)
    exact = group_norm_silu_reference(*exact_inputs[:3], *arguments, exact_inputs[3])
    expected = torch.autograd.grad(exact, [t for t in exact_inputs if t is not None], grad.double())
    pixels = x.shape[2] * x.shape[3]
    scales = 20, x.shape[0] * pixels, x.shape[0] * pixels, pixels  # of x; the others are sums of as many terms
    for a, b, scale in zip(ours, expected, scales):
        assert_rounded(a, b, scale)


@kernel_test
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("value", [6e4, -6e4, 0.1, 0.0])
def test_group_norm_of_a_constant_is_its_bias(device: str, value: float, blocks: bool) -> None:
    x = torch.full((2, 14, 20, 18), value, dtype=torch.float16, device=device)
    weight, bias = random(0, device, "fp16")(2, 14)
    with in_blocks(blocks):
        y = torch.ops.emt.group_norm_silu(x, weight, bias, 2, 1e-5, False)
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@kernel_test
@pytest.mark.parametrize("blocks", [False, True])
def test_group_norm_of_extreme_values(device: str, blocks: bool) -> None:
    """The largest differences that float16 holds, and the smallest beside a large mean."""
    signs = torch.randint(0, 2, (2, 14, 20, 18), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    one, zero = torch.ones(14, device=device).half(), torch.zeros(14, device=device).half()
    for x in (65504 * signs, 30_000 + 16 * signs, -2_000 + signs):
        half = x.half().to(device)
        assert torch.equal(half.double().cpu(), x)
        with in_blocks(blocks):
            y = torch.ops.emt.group_norm_silu(half, one, zero, 2, 1e-5, False)
        assert_rounded(y, F.group_norm(half.double(), 2, eps=1e-5), 100)


@kernel_test
def test_group_norm_operators_are_registered_well(device: str) -> None:
    case = {"shape": (2, 6, 20, 18), "groups": 2, "dtype": "fp32", "shifted": "each", "channels_last": True, "seed": 0}
    inputs = [t.requires_grad_() for t in group_norm_inputs(case, device) if t is not None]
    x, weight, bias, shift = inputs
    _check_operator(torch.ops.emt.group_norm_silu, (x, weight, bias, 2, 1e-5, True, shift), device)
    with in_blocks(True):
        _check_operator(torch.ops.emt.group_norm_silu, (x, weight, bias, 2, 1e-5, True), device)
    detached = [t.detach() for t in (torch.randn_like(x), *inputs)]
    _check_operator(torch.ops.emt.group_norm_silu_backward, (*detached[:4], 2, 1e-5, True, detached[4]), device)


def _check_operator(operator: Any, arguments: tuple[Any, ...], device: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if device == "cuda":  # tracing refuses interpreted kernels
        checks.append("test_aot_dispatch_static")
    torch.library.opcheck(operator.default, arguments, test_utils=checks)


@given(size=st.integers(1, 5000), pixels=st.integers(1, 20_000) | st.just(512 * 512))
@settings(deadline=None)
def test_plan_holds_the_group(size: int, pixels: int) -> None:
    p = plan(size, pixels)
    if p is not None:
        assert p.lanes >= size
        assert p.rows <= 2 * pixels
        assert p.lanes * p.rows <= 16_384  # more would not fit into registers


def test_plan_of_the_published_network() -> None:
    """Groups are read by one program each at 16×16 and below; larger frames are read block by block."""
    cached = [(40, 16 * 16), (60, 16 * 16), (40, 8 * 8), (80, 8 * 8)]
    assert all(plan(*case) is not None for case in cached)
    assert all(plan(*case) is None for case in [(10, 64 * 64), (20, 64 * 64), (30, 64 * 64), (20, 32 * 32)])


# ----------------------------------------------------------------------------------------------------- layer_norm


@kernel_test
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 70)),
    dtype=dtypes,
    positioned=st.booleans(),
    summed=st.booleans(),
    plain=st.booleans(),
    shifted=st.booleans(),
    seed=seeds,
)
@few
def test_layer_norm(
    device: str,
    shape: tuple[int, int, int, int],
    dtype: str,
    positioned: bool,
    summed: bool,
    plain: bool,
    shifted: bool,
    seed: int,
) -> None:
    make = random(seed, device, dtype)
    x, weight, bias = make(*shape, scale=3, mean=1), make(shape[3]), make(shape[3])
    positions = make(shape[1], shape[3]) if positioned else None
    residual = make(*shape) if summed else None
    shift = make(shape[3], scale=3) if shifted else None
    with poisoned_memory():
        ours = torch.ops.emt.layer_norm(x, weight, bias, 1e-5, positions, residual, plain, shift)
    total = x if residual is None else ours[0]  # the norm is that of the sum as it is kept, rounded
    _, *exact = layer_norm_reference(*wide(total, weight, bias), 1e-5, *wide(positions), shift=wide(shift)[0])
    expected = [] if residual is None else [x.double() + residual.double()]
    expected += exact[:1] * (plain or not positioned) + exact[1:] * positioned
    assert len(ours) == len(expected)
    scale = 10 + exact[0].abs()
    for a, b in zip(ours, expected):
        assert a.dtype == x.dtype
        assert_rounded(a, b, scale)


@kernel_test
@pytest.mark.parametrize("channels", [1, 7, 320])
def test_layer_norm_of_extreme_values(device: str, channels: int) -> None:
    weight, bias = random(0, device, "fp16")(2, channels)
    for value in (6e4, -6e4, 0.1):
        constant = torch.full((3, channels), value, dtype=torch.float16, device=device)
        assert torch.equal(torch.ops.emt.layer_norm(constant, weight, bias, 1e-5)[0], bias.expand(3, channels))
    signs = torch.randint(0, 2, (5, channels), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    for x in (65504 * signs, 30_000 + 16 * signs):
        half = x.half().to(device)
        for shift in (None, half[0]):  # doubled, the largest are more than float16 holds
            (y,) = torch.ops.emt.layer_norm(half, weight, bias, 1e-5, shift=shift)
            assert_rounded(y, layer_norm_reference(*wide(half, weight, bias), 1e-5, shift=wide(shift)[0])[2], 100)


@kernel_test
def test_layer_norm_operator_is_registered_well(device: str) -> None:
    make = random(0, device, "fp32")
    x, weight, bias, positions = make(2, 3, 5, 6), make(6), make(6), make(3, 6)
    for extra in ((), (positions,), (None, x.clone()), (positions, x.clone(), False), (None, None, True, bias.clone())):
        _check_operator(torch.ops.emt.layer_norm, (x, weight, bias, 1e-5, *extra), device)


# ---------------------------------------------------------------------------------------------------------- geglu


@kernel_test
@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), inner=st.integers(1, 300), dtype=dtypes, seed=seeds)
@few
def test_geglu(device: str, shape: list[int], inner: int, dtype: str, seed: int) -> None:
    x = random(seed, device, dtype)(*shape, 2 * inner, scale=3)
    with poisoned_memory():
        y = torch.ops.emt.geglu(x)
    assert y.dtype == x.dtype
    h, _ = x.double().chunk(2, -1)
    assert_rounded(y, geglu_reference(x.double()), h.abs())


@kernel_test
def test_geglu_of_extreme_values(device: str) -> None:
    h = torch.tensor([1.0, -2.0, 0.0, 1.0, 65504.0], dtype=torch.float16)
    gate = torch.tensor([65504.0, -65504.0, 6e4, -4.0, 0.5], dtype=torch.float16)
    x = torch.cat([h, gate]).to(device)
    assert_rounded(torch.ops.emt.geglu(x), geglu_reference(x.double()), x[:5].double().abs())


@kernel_test
def test_geglu_operator_is_registered_well(device: str) -> None:
    _check_operator(torch.ops.emt.geglu, (random(0, device, "fp32")(2, 3, 10),), device)


# ------------------------------------------------------------------------------- what the network calls, and errors


def test_reference_runs_where_triton_does_not() -> None:
    """On the CPU, and differentiably."""
    make = random(0, "cpu", "fp32")
    x, weight, bias = (t.requires_grad_() for t in (make(2, 6, 3, 5), make(6), make(6)))
    shift, tokens, positions = make(2, 6), make(1, 3, 5, 6).requires_grad_(), make(3, 6)
    y = group_norm_silu(x, weight, bias, 2, 1e-5, True, shift)
    assert torch.equal(y, F.silu(F.group_norm(x + shift[:, :, None, None], 2, weight, bias, 1e-5)))
    total, normalized, positioned = layer_norm(tokens, weight, bias, 1e-5, positions, tokens)
    assert torch.equal(total, 2 * tokens)
    assert torch.equal(normalized, F.layer_norm(2 * tokens, (6,), weight, bias))
    assert torch.equal(positioned, normalized + positions[:, None])
    assert layer_norm(tokens, weight, bias, 1e-5)[0] is tokens
    assert layer_norm(tokens, weight, bias, 1e-5, positions, plain=False)[1] is None
    (y.sum() + positioned.sum() + geglu(tokens).sum()).backward()
    assert all(t.grad is not None for t in (x, weight, bias, tokens))


def test_wrong_shapes_are_named() -> None:
    x, six, five = torch.zeros(2, 6, 3, 5), torch.zeros(6), torch.zeros(5)
    with pytest.raises(ValueError, match=r"\(2, 6, 3, 5\).*divisible by 4"):
        group_norm_silu(x, six, six, 4, 1e-5, True)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\), expected \(6,\)"):
        group_norm_silu(x, six, five, 2, 1e-5, True)
    with pytest.raises(ValueError, match=r"shift has shape \(6,\), expected \(2, 6\)"):
        group_norm_silu(x, six, six, 2, 1e-5, True, six)
    with pytest.raises(ValueError, match=r"weight has shape \(6,\), expected \(5,\)"):
        layer_norm(x, six, five, 1e-5)
    with pytest.raises(ValueError, match=r"beside has shape \(2, 6, 5, 3\).*\(2, 6, 3, 5\)"):
        group_norm_silu(x, six, six, 2, 1e-5, True, beside=x.mT)
    with pytest.raises(ValueError, match=r"positions has shape \(2, 5\), expected \(6, 5\)"):
        layer_norm(x, five, five, 1e-5, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(batch, frames, tokens, channels\)"):
        layer_norm(x[0, 0], five, five, 1e-5, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"shift has shape \(6,\), expected \(5,\)"):
        layer_norm(x, five, five, 1e-5, shift=six)
    with pytest.raises(ValueError, match=r"residual has shape \(6, 3, 5\), expected \(2, 6, 3, 5\)"):
        layer_norm(x, five, five, 1e-5, residual=x[0])
    with pytest.raises(ValueError, match="even number of channels"):
        geglu(x)


# --------------------------------------------------------------------------------------------------- for real GPUs


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile(capability: int) -> None:
    pytest.importorskip("triton")
    half = (
        "x",
        "beside",
        "weight",
        "bias",
        "shift",
        "out",
        "grad",
        "grad_x",
        "positions",
        "residual",
        "total",
        "positioned",
    )
    types = dict.fromkeys(half, "fp16") | dict.fromkeys(("partial", "statistics", "sums", "means"), "fp32")
    norm = {
        "EPS": 1e-5,
        "SILU": True,
        "SHIFT": True,
        "PAIR": True,
        "ALIGN": 8,
        "LANES": 64,
        "ROWS": 8,
        "BLOCK": 8,
    }  # few rows compile sooner
    layer = {"EPS": 1e-5, "PLAIN": True, "POSITIONS": True, "RESIDUAL": True, "SHIFT": True, "ROWS": 1, "LANES": 512}
    group = group_norm_module
    for kernel, constants in (
        (group._group_norm_frame, norm | {"pixels": 1, "group_units": 1}),  # the launcher makes constants of ones
        (group._group_norm_statistics, norm),
        (group._group_norm_combine, norm | {"blocks": 1}),
        (group._group_norm_apply, norm),
        (group._group_norm_gradient_sums, norm),
        (group._group_norm_input_gradient, norm),
        (layer_norm_module._layer_norm_kernel, layer),
        (geglu_module._geglu_kernel, {"ROWS": 2, "LANES": 256}),
    ):
        names = [parameter.name for parameter in kernel.params]
        pointers = {name: types[name] for name in names if name in types}
        constants = {name: value for name, value in constants.items() if name in names}
        assert compiled(kernel, pointers, constants, capability, num_warps=4).asm["cubin"]


def _network_like(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """All three kernels, in sequence."""
    h = group_norm_silu(x, weight, bias, 4, 1e-5, True, x[:, :, 0, 0])
    tokens = h.permute(0, 2, 3, 1).flatten(1, 2)[None]
    total, _, positioned = layer_norm(tokens, weight, bias, 1e-5, positions, tokens, shift=bias)
    return geglu(total + positioned)


def _network_inputs() -> tuple[Tensor, ...]:
    make = random(0, "cuda", "fp16")
    return make(3, 64, 20, 24).contiguous(memory_format=torch.channels_last), make(64), make(64), make(3, 64)


@pytest.mark.gpu
def test_compiled_and_captured_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA GPU")
    inputs = _network_inputs()
    with torch.no_grad():
        expected = _network_like(*inputs)
        assert torch.equal(_network_like(*inputs), expected)
        # The compiler tells Triton other things of sizes: sums come in another order, and halves round otherwise.
        fused = torch.compile(_network_like, fullgraph=True)(*inputs)
        torch.testing.assert_close(fused, expected, rtol=4e-3, atol=4e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _network_like(*inputs)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_gradients_repeat_bit_for_bit_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA GPU")
    x, weight, bias, _ = (t.requires_grad_() for t in _network_inputs())
    runs = []
    for _ in range(3):
        y = group_norm_silu(x, weight, bias, 4, 1e-5, True)
        runs.append((y, *torch.autograd.grad(y.float().square().sum(), (x, weight, bias))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))
