"""The rest of a scaler between its convolutions: kernels against float64, and compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import compiled, kernel_test, needs_triton, poisoned_memory

from emt_kernels import scale_map as module
from emt_kernels.scale_map import gelu_of_sum, gelu_of_sum_reference, scale_map, scale_map_reference

few = settings(max_examples=8, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(1, 7))


def tensor(*shape: int, dtype: torch.dtype, device: str, channels_last: bool = False) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@kernel_test
@given(
    size=sizes,
    copies=st.integers(1, 3),
    count=st.integers(1, 3),
    bias=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
@few
def test_gelu_of_any_sum(device, size, copies, count, bias, channels_last, dtype) -> None:
    kind = {"dtype": getattr(torch, dtype), "device": device, "channels_last": channels_last}
    x = tensor(copies * count, *size, **kind)
    added = tensor(1, size[0], 1, 1, **kind) if bias else tensor(count, *size, **kind)
    exact = gelu_of_sum_reference(x.double(), added.double())
    y = module.launch_gelu(x.clone(memory_format=torch.preserve_format), added)
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=2e-6)


@kernel_test
@given(size=sizes, count=st.integers(1, 3), channels_last=st.booleans(), dtype=st.sampled_from(["float16", "float32"]))
@few
def test_any_map(device, size, count, channels_last, dtype) -> None:
    kind = {"dtype": getattr(torch, dtype), "device": device}
    x = tensor(count, *size, **kind, channels_last=channels_last)
    weight, bias = tensor(1, size[0], 3, 3, **kind, channels_last=channels_last), tensor(1, **kind) + 5
    with poisoned_memory():
        y = module.launch_map(x, weight, bias)
    exact = scale_map_reference(*(t.double() for t in (x, weight, bias)))
    torch.testing.assert_close(y.double(), exact, rtol=1e-5 + 2 * torch.finfo(x.dtype).eps, atol=1e-7)


def test_without_a_gpu_they_are_their_references() -> None:
    x, added = torch.randn(4, 3, 5, 6), torch.randn(2, 3, 5, 6)
    assert torch.equal(gelu_of_sum(x, added), gelu_of_sum_reference(x, added))
    weight, bias = torch.randn(1, 3, 3, 3), torch.randn(1)
    assert torch.equal(scale_map(x, weight, bias), scale_map_reference(x, weight, bias))
    with pytest.raises(ValueError, match=r"\(3, 3, 5, 6\)"):
        gelu_of_sum(x, x[:3])
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\)"):
        scale_map(x, weight[:, :2], bias)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_real_gpus(capability: int) -> None:
    half = dict.fromkeys(("x", "added", "weight", "bias", "out"), "fp16")
    for kernel, constants, names in (
        (module._gelu_of_sum, {"BLOCK": 1024}, ("x", "added")),
        (module._scale_map, {"PIXELS": 64, "LANES": 32}, ("x", "weight", "bias", "out")),
    ):
        pointers = {name: half[name] for name in names}
        assert compiled(kernel, pointers, constants, capability, num_warps=4).asm["cubin"]
