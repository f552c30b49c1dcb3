"""Group norm that reads its input once: against a float64 reference, and compiled for GPUs that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_testing import compiled, kernel_test, needs_triton, poisoned_memory

from emt_kernels import group_norm_one_read as module
from emt_kernels.group_norm_one_read import Plan, plan
from emt_kernels.group_norm_silu import group_norm_silu_reference

few = settings(max_examples=10, deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    assume(size * height * width > 1)
    return {
        "shape": (draw(st.integers(1, 3)), groups * size, height, width),
        "groups": groups,
        "run": draw(st.integers(1, groups)),
        "hold": draw(st.booleans()),
        "rows": draw(st.sampled_from([1, 4, 16, 128])),
        "dtype": draw(st.sampled_from(["float16", "float32"])),
        "silu": draw(st.booleans()),
        "shifted": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, 100.0])),
    }


def check(device: str, case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, getattr(torch, case["dtype"]))

    frames, channels, *_ = case["shape"]
    x = make(*case["shape"]) * 2 + case["mean"]
    weight, bias = make(channels), make(channels)
    shift = make(frames, channels) if case["shifted"] else None
    chosen = Plan(case["run"], case["rows"], 4, case["hold"])
    arguments = case["groups"], 1e-5, case["silu"]
    with poisoned_memory():
        y = module.launch(x, weight, bias, *arguments, shift, chosen, wait=device == "cuda")
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    wide = [None if t is None else t.double() for t in (x, weight, bias, shift)]
    exact = group_norm_silu_reference(*wide[:3], *arguments, wide[3])
    plain = group_norm_silu_reference(*wide[:3], *arguments[:2], False, wide[3]).abs()
    bound = torch.finfo(x.dtype).eps * exact.abs() + (2e-5 + 1e-6 * case["mean"]) * (2 + plain)
    excess = ((y.double() - exact).abs() / bound).max().item()
    assert excess <= 1, f"{excess:.1f} times the bound"


@kernel_test
@given(case=cases())
@few
def test_any_shape_and_tile(device: str, case: dict[str, Any]) -> None:
    check(device, case)


@kernel_test
@pytest.mark.parametrize("value", [6e4, -6e4, 0.1, 0.0])
def test_a_constant_becomes_its_bias(device: str, value: float) -> None:
    x = torch.full((2, 12, 5, 7), value, dtype=torch.float16, device=device)
    weight, bias = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).half().to(device)
    y = module.launch(x, weight, bias, 4, 1e-5, False, None, Plan(3, 16, 4), wait=device == "cuda")
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32, 320, 64, 64), (32, 960, 64, 64), (8, 640, 96, 96), (1, 320, 8, 8)])
def test_real_shapes_again_and_again(shape: tuple[int, ...]) -> None:
    """More units than the GPU holds at once, many times over: whoever waited for nobody would hang."""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = plan(shape[1] // 32, 32, shape[2] * shape[3], count)
    assert chosen is not None
    x = torch.randn(shape, device="cuda").half().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1], device="cuda").half()
    found = [module.launch(x, weight, bias, 32, 1e-5, True, None, chosen) for _ in range(50)]
    assert all(torch.equal(found[0], y) for y in found)
    exact = group_norm_silu_reference(x.float(), weight.float(), bias.float(), 32, 1e-5, True)
    assert (found[0].float() - exact).abs().max() < 2e-2


@given(size=st.integers(1, 200), groups=st.integers(1, 64), pixels=st.integers(1, 40_000), count=st.integers(1, 148))
def test_a_plan_never_waits_for_programs_that_cannot_run(size: int, groups: int, pixels: int, count: int) -> None:
    chosen = plan(size, groups, pixels, count)
    if chosen is not None:
        assert 1 <= chosen.run <= groups
        assert -(-pixels // chosen.rows) <= count
        assert chosen.warps in (4, 8, 16) or chosen.warps & (chosen.warps - 1) == 0


def test_plans_of_the_published_network() -> None:
    """All of its large frames, on an H200 with 132 multiprocessors; at most a sixteenth of the lanes is idle."""
    for size, pixels in ((10, 4096), (20, 4096), (30, 4096), (20, 1024), (40, 1024), (60, 256)):
        chosen = plan(size, 32, pixels, 132)
        assert chosen is not None
        assert chosen.run * size >= 120


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_for_real_gpus(capability: int) -> None:
    chosen = plan(10, 32, 4096, 132)
    assert chosen is not None
    constants = {
        "EPS": 1e-5, "SILU": True, "SHIFT": True, "WAIT": True, "HOLD": False, "ALIGN": 8,
        "UNITS": chosen.run * 10 // 8, "SIZE": 10, "RUN": chosen.run, "RUNS": 16,
        "LANES": 128, "ROWS": chosen.rows, "PARTS": 64,
    }  # fmt: skip
    pointers = dict.fromkeys(("x", "weight", "bias", "shift", "out"), "fp16") | {"partial": "fp32", "arrived": "i32"}
    made = compiled(module._group_norm_one_read, pointers, constants, capability, num_warps=chosen.warps)
    assert made.asm["cubin"]
    ptx = made.asm["ptx"]
    assert "atom" in ptx
    assert "ld.global.cg" in ptx
    assert "ld.global.v4" in ptx  # rows are read 16 bytes at once
