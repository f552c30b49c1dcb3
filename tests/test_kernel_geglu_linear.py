"""A product with its gated GELU: both kernels against a float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import CAPABILITIES, kernel_test, poisoned_memory
from torch import Tensor

from emt_kernels import geglu_linear as module
from emt_kernels.geglu_linear import PLAIN, PLANS, Plan, fuses, geglu_linear, geglu_linear_reference

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

few = settings(max_examples=8, deadline=None, derandomize=True)
# Tiles as small as the tensor cores have them, so that small matrices have several.
TINY = Plan(16, 16, 16, 4, 2)
DESCRIBED = [Plan(16, 16, 16, 4, 2, programs, descriptors=True) for programs in (0, 1)]


@dataclass(frozen=True)
class Case:
    """A product: sizes, type, and whether rows of x lie apart."""

    rows: int
    inner: int
    channels: int
    dtype: str
    strided: bool
    seed: int

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight and bias; what lies between the rows of x is NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def make(*shape: int, scale: float = 1) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, DTYPES[self.dtype])

        x = make(self.rows, self.channels)
        if self.strided:
            wide = x.new_full((self.rows, 2 * self.channels), torch.nan)
            wide[:, : self.channels] = x
            x = wide[:, : self.channels]
        weight = make(2 * self.inner, self.channels, scale=2 * self.channels**-0.5)
        return x, weight, make(2 * self.inner)


def cases(step: int = 1) -> st.SearchStrategy[Case]:
    """Small sizes, of columns in multiples of `step`."""
    columns = st.integers(1, 40 // step).map(lambda n: n * step)
    return st.builds(
        Case,
        rows=st.integers(1, 40),
        inner=columns,
        channels=columns,
        # Triton's interpreter takes the bits of bfloat16 for whole numbers in products: only a GPU tests it.
        dtype=st.sampled_from(["fp16", "fp32"] if step == 1 else ["fp16"]),
        strided=st.booleans(),
        seed=st.integers(0, 2**16),
    )


def assert_rounded(ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Equal to within one rounding of the exact result, and what sums in float32 add to it."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    exact = geglu_linear_reference(x, weight, bias)
    value, gate = F.linear(x.abs(), weight.abs(), bias.abs()).chunk(2, -1)  # bounds of every partial sum
    assert ours.shape == exact.shape
    bound = torch.finfo(ours.dtype).eps * exact.abs() + 2e-6 * (1 + value) * (1 + gate)
    excess = ((ours.double() - exact).abs() / bound).max().item()
    assert excess <= 1, f"{excess:.1f} times the bound"


@kernel_test
@given(case=cases())
@few
def test_any_shape(device: str, case: Case) -> None:
    tensors = case.tensors(device)
    with poisoned_memory():
        y = module.launch(*tensors, TINY)
    assert y.dtype == tensors[0].dtype
    assert_rounded(y, *tensors)


@kernel_test
@pytest.mark.parametrize("plan", DESCRIBED)
@given(case=cases(step=8))
@settings(few, max_examples=4)
def test_described_tiles(device: str, plan: Plan, case: Case) -> None:
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors are for Hopper and newer")
    tensors = case.tensors(device)
    if device == "cuda":  # a swizzled row of 32 bytes is the least there
        plan = replace(plan, rows=64, channels=64)
    with poisoned_memory():
        y = module.launch(*tensors, plan)
    assert_rounded(y, *tensors)


@kernel_test
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3), (0,), (2, 0, 3)])
def test_leading_dimensions(device: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator).to(device) for s in ((*shape, 5), (14, 5), (14,)))
    y = torch.ops.emt.geglu_linear(x, weight, bias)
    assert y.shape == (*shape, 7)
    if y.numel():
        assert_rounded(y, x, weight, bias)


@kernel_test
def test_gates_of_every_size(device: str) -> None:
    """The GELU is as exact as float32 from gates that close to gates that are open."""
    gates = torch.cat([torch.linspace(-12, 12, 1997), torch.tensor([-65504.0, -300.0, 300.0, 65504.0])])
    x, weight = gates[:, None].to(device), torch.tensor([[0.0], [1.0]], device=device)
    y = (
        module.launch(x, weight, torch.tensor([1.0, 0.0], device=device), replace(TINY, rows=256))
        .double()
        .flatten()
        .cpu()
    )
    exact = F.gelu(gates.double())
    assert ((y - exact).abs() <= 2.5e-7 + 2e-7 * exact.abs()).all()
    open_or_closing = gates > -4
    assert ((y - exact).abs()[open_or_closing] <= 1e-4 * exact.abs()[open_or_closing]).all()


@kernel_test
def test_large_values_do_not_overflow(device: str) -> None:
    """Products beyond float16's range that the gate closes, or that cancel."""
    x = torch.full((2, 16), 3e4, dtype=torch.float16, device=device)
    weight = torch.full((4, 16), 60.0, dtype=torch.float16, device=device)
    weight[1, ::2] *= -1  # a value of nought
    weight[2:] *= -1
    weight[3] = 1e-6
    y = module.launch(x, weight, torch.zeros(4, dtype=torch.float16, device=device), TINY)
    assert torch.equal(y, torch.zeros_like(y))


@kernel_test
def test_operator_is_registered_well(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(s, generator=generator).to(device) for s in ((2, 3, 5), (6, 5), (6,)))
    tests = ("test_schema", "test_faketensor") if device == "cpu" else None
    torch.library.opcheck(torch.ops.emt.geglu_linear, tensors, **({"test_utils": tests} if tests else {}))


def _compiled(plan: Plan, capability: int, ones: tuple[str, ...] = ()) -> Any:
    """What Triton makes of a plan in float16, for GPUs of a compute capability, none of which need be here."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = module._geglu_linear_described if plan.descriptors else module._geglu_linear_kernel
    constants = {"ROWS": plan.rows, "INNER": plan.inner, "CHANNELS": plan.channels}
    blocks = {
        "x": f"{plan.rows}, {plan.channels}",
        "weight": f"2, {plan.inner}, {plan.channels}",
        "out": f"{plan.rows}, {plan.inner}",
    }
    names = [parameter.name for parameter in kernel.params]
    constants |= dict.fromkeys(ones, 1)
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr") | {"bias": "*fp16"}
    signature |= {name: f"tensordesc<fp16[{b}]>" if plan.descriptors else "*fp16" for name, b in blocks.items()}
    aligned = [name for name in names if signature[name] in ("i32", "*fp16") and name != "programs"]
    source = ASTSource(
        kernel,
        signature,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_for_every_gpu(capability: int) -> None:
    assert _compiled(PLAIN, capability).asm["cubin"]


@pytest.mark.parametrize("ones", [("inner", "channels", "weight_row"), ("rows", "x_row")])
def test_sizes_of_one_compile(ones: tuple[str, ...]) -> None:
    """Triton makes constants of them, which are no tensors."""
    assert _compiled(TINY, 90, ones).asm["cubin"]


@pytest.mark.parametrize("plan", sorted(set(PLANS.values()), key=str), ids=str)
def test_described_tiles_compile_to_one_asynchronous_product(plan: Plan) -> None:
    """Values and gates in one instruction that reads both operands from shared memory, of which there is enough."""
    made = _compiled(plan, 90)
    assert made.asm["cubin"]
    assert f"wgmma.mma_async.sync.aligned.m64n{2 * plan.inner}k16" in made.asm["ptx"]
    assert "ttg.convert_layout" not in made.asm["ttgir"]
    assert made.metadata.shared <= 227 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("channels", [320, 640, 1280, 24, 21])
def test_sizes_of_networks_on_a_gpu(channels: int, dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA GPU")
    for rows, strided in ((2048, False), (1000, True), (1, False)):
        tensors = Case(rows, 4 * channels, channels, dtype, strided, 0).tensors("cuda")
        with torch.no_grad(), poisoned_memory():
            y = geglu_linear(*tensors)
        assert_rounded(y, *tensors)


def test_reference_runs_where_triton_does_not() -> None:
    """On the CPU, and differentiably; the network then keeps its two kernels."""
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(8, 5).requires_grad_(), torch.randn(8)
    y = geglu_linear(x, weight, bias)
    h, gate = F.linear(x, weight, bias).chunk(2, -1)
    assert torch.equal(y, h * F.gelu(gate))
    y.sum().backward()
    assert weight.grad is not None
    assert not fuses(x, weight)


def test_wrong_shapes_are_named() -> None:
    x = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 6\), expected an even number"):
        geglu_linear(x, torch.zeros(3, 6), torch.zeros(3))
    with pytest.raises(ValueError, match=r"x has shape \(2, 6\), expected \(…, 5\)"):
        geglu_linear(x, torch.zeros(4, 5), torch.zeros(4))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\)"):
        geglu_linear(x, torch.zeros(4, 6), torch.zeros(3))
