"""The temporal integration's kernels against their reference, in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import CAPABILITIES, compiled, kernel_test
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from emt_engines.toolchain import toolchain
from emt_kernels import temporal_attention as module
from emt_kernels.selection import interpreted
from emt_kernels.temporal_attention import temporal_attention, temporal_attention_reference

pytest.importorskip("triton")

# Triton's interpreter has no products of bfloat16.
TYPES = (torch.float32, torch.float16) if interpreted() else (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("query", "key", "value", "reference_key", "reference_value", "position_key", "position_value", "scale")


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `reference_frames` is 0 without a reference."""

    references: int
    samples: int  # of each reference
    frames: int
    reference_frames: int
    tokens: int
    heads: int
    head_size: int
    dtype: torch.dtype
    fused: bool  # query, key and value are slices of one product
    seed: int


def cases(dtypes: tuple[torch.dtype, ...] = TYPES) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        references=st.integers(1, 2),
        samples=st.integers(1, 2),
        frames=st.integers(1, 32),
        reference_frames=st.one_of(st.just(0), st.integers(1, 32)),
        tokens=st.integers(1, 3),
        heads=st.integers(1, 3),
        head_size=st.sampled_from([1, 5, 16, 24, 40, 48, 80, 160]),
        dtype=st.sampled_from(dtypes),
        fused=st.booleans(),
        seed=st.integers(0, 2**16),
    )


def inputs(case: Case, device: str) -> list[Any]:
    """Arguments of a call, normal values that lie within memory full of NaN."""
    generator = torch.Generator().manual_seed(case.seed)

    def within(*shape: int) -> Tensor:
        whole = torch.full([size + 2 for size in shape], math.nan)
        inside = (slice(1, -1),) * len(shape)
        whole[inside] = torch.randn(shape, generator=generator)
        return whole.to(device, case.dtype)[inside]

    batch, channels = case.references * case.samples, case.heads * case.head_size
    own = (batch, case.frames, case.tokens, channels)
    if case.fused:
        query, key, value = within(*own[:-1], 3 * channels).chunk(3, dim=-1)
    else:
        query, key, value = (within(*own) for _ in range(3))
    arguments = [query, key, value, case.heads]
    if case.reference_frames:
        kept = (case.references, case.reference_frames, case.tokens, channels)
        arguments += [within(*kept), within(*kept)]
        arguments += [within(case.reference_frames, channels), within(case.reference_frames, channels)]
        arguments += [within(batch, case.reference_frames, case.tokens).sigmoid()]
    return arguments


def exact(arguments: list[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in arguments]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, so that an element that nothing writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(ours: Tensor, expected: Tensor, size: float, what: str = "") -> None:
    """Within twice the rounding of the type, at values of `size`."""
    error = (ours.double() - expected).abs().max().item()
    allowed = 2 * max(torch.finfo(ours.dtype).eps, 1e-6) * size
    assert error <= allowed, f"{what} is off by {error}, allowed are {allowed}"


@kernel_test
@settings(max_examples=10, deadline=None, derandomize=True)
@given(case=cases())
def test_forward_is_the_references(device: str, case: Case) -> None:
    arguments = inputs(case, device)
    with poisoned():
        out = torch.ops.emt.temporal_attention(*arguments)
    assert out.dtype == case.dtype
    assert out.is_contiguous()
    assert_close(out, temporal_attention_reference(*exact(arguments)), 6.0)


@kernel_test
@settings(max_examples=5, deadline=None, derandomize=True)
@given(case=cases())
def test_gradients_are_the_references(device: str, case: Case) -> None:
    arguments = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs(case, device)]
    wide = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in exact(arguments)]
    ours = [x for x in arguments if isinstance(x, Tensor)]
    with poisoned():
        out = torch.ops.emt.temporal_attention(*arguments)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        got = torch.autograd.grad(out, ours, gradient)
    expected = torch.autograd.grad(
        temporal_attention_reference(*wide), [x for x in wide if isinstance(x, Tensor)], gradient.double()
    )
    for name, x, y in zip(NAMES, got, expected):
        assert x.dtype == case.dtype
        # A key alone takes all attention: its gradient is 0, and what is left is the rounding of its summands.
        assert_close(x, y, 1.0 + 4 * y.abs().max().item(), name)


@kernel_test
def test_gradients_repeat(device: str) -> None:
    case = Case(1, 2, 3, 4, 3 if device == "cpu" else 4096, 2, 40, torch.float16, False, 0)
    arguments = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs(case, device)]
    tensors = [x for x in arguments if isinstance(x, Tensor)]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(torch.ops.emt.temporal_attention(*arguments).sum(), tensors)

    for name, x, y in zip(NAMES, gradients(), gradients()):
        assert torch.equal(x, y), f"the gradient of {name} does not repeat"


@kernel_test
@settings(max_examples=3, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16))
def test_the_largest_values_of_float16_do_not_overflow(device: str, seed: int) -> None:
    case = Case(1, 2, 7, 5, 3, 2, 40, torch.float16, False, seed)
    arguments = [(x * 2e4).clamp(-6e4, 6e4) if isinstance(x, Tensor) else x for x in inputs(case, device)]
    arguments[-1] = arguments[-1] / 2e4  # the scale stays between 0 and 1
    out = torch.ops.emt.temporal_attention(*arguments)
    expected = temporal_attention_reference(*exact(arguments))
    representable = expected.abs() < 65_504  # s·v + p may itself be beyond float16
    assert_close(out[representable], expected[representable], 6e4)
    assert not out.isnan().any()


@kernel_test
def test_equal_scores_of_the_largest_values_average(device: str) -> None:
    own = torch.full((1, 8, 2, 40), 6e4, dtype=torch.float16, device=device)
    value = torch.linspace(-6e4, 6e4, 8, device=device).half()[None, :, None, None].expand(1, 8, 2, 40)
    out = torch.ops.emt.temporal_attention(own, own, value, 1)
    assert_close(out, value.double().mean(1, keepdim=True).expand(out.shape), 6e4)


@kernel_test
@pytest.mark.parametrize(
    "chosen", [module.Plan(1, 1, 1, 64, 3), module.Plan(8, 4, 3, 32, 2), module.Plan(2, 1, 2, 16, 8)]
)
def test_every_plan_computes_the_same(device: str, chosen: module.Plan) -> None:
    arguments = inputs(Case(1, 2, 6, 9, 5, 3, 40, torch.float16, True, 0), device)
    with poisoned():
        out = module.launch(*arguments, chosen=chosen)
    assert_close(out, temporal_attention_reference(*exact(arguments)), 6.0)


@kernel_test
def test_other_layouts(device: str) -> None:
    arguments = inputs(Case(1, 2, 4, 4, 3, 2, 24, torch.float32, False, 0), device)
    expected = temporal_attention_reference(*exact(arguments))
    arguments[0] = arguments[0].transpose(0, 2).contiguous().transpose(0, 2)  # tokens before frames
    arguments[1] = arguments[1].transpose(2, 3).contiguous().transpose(2, 3)  # tokens next to each other
    arguments[4] = arguments[4].contiguous()
    assert_close(torch.ops.emt.temporal_attention(*arguments), expected, 6.0)


def test_plans_fit_every_gpu() -> None:
    for head_size in range(1, 257):
        for rows in (48, 80, 160):
            for itemsize in (2, 4):
                p = module.plan(8, head_size, rows, itemsize, reference=rows > 48)
                columns = p.columns + module._rest(head_size, p.columns)
                assert head_size <= columns < max(2 * head_size, 17)
                assert p.heads * rows * columns * itemsize * max(p.stages - 1, 1) <= 200_000


@pytest.mark.parametrize("reference", [False, True])
def test_without_triton_the_reference_runs(reference: bool) -> None:
    arguments = inputs(Case(2, 2, 3, 4 if reference else 0, 5, 2, 8, torch.float32, True, 0), "cpu")
    assert torch.equal(temporal_attention(*arguments), temporal_attention_reference(*arguments))


def test_wrong_shapes_are_named() -> None:
    query, key, value, heads, *reference = inputs(Case(2, 2, 3, 4, 5, 2, 8, torch.float32, True, 0), "cpu")
    with pytest.raises(ValueError, match=r"divisible by 3 heads"):
        temporal_attention(query, key, value, 3)
    with pytest.raises(ValueError, match=r"key has shape \(4, 2, 5, 16\), expected \(4, 3, 5, 16\)"):
        temporal_attention(query, key[:, 1:], value, heads)
    with pytest.raises(ValueError, match="2 references for 3 samples"):
        temporal_attention(query[1:], key[1:], value[1:], heads, *reference)
    with pytest.raises(ValueError, match="without scale"):
        temporal_attention(query, key, value, heads, *reference[:-1])
    with pytest.raises(ValueError, match="without reference_key"):
        temporal_attention(query, key, value, heads, scale=reference[-1])
    with pytest.raises(ValueError, match="position_value has shape"):
        temporal_attention(query, key, value, heads, *reference[:3], reference[3][:, 1:], reference[4])


# ------------------------------------------------------------------------------------------------------ compilers


def arguments_of(kernel: str, head_size: int, reference: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What the launcher gives a kernel for two clips of 16 frames of 64×64, 8 heads."""
    empty = torch.empty((2, 16, 4096, 8 * head_size), dtype=dtype, device="meta")
    frames = 16 if reference else 0
    tensors = dict.fromkeys(("query", "key", "value", "reference_key", "reference_value"), empty)
    tensors |= dict.fromkeys(("position_key", "position_value"), empty[0, :, 0]) | {"scale": empty[..., 0]}
    if kernel == "forward":
        tensors["out"] = empty
        return module._forward_arguments(tensors, 8, frames, module._plan(empty, 8, frames))[1]
    tensors |= dict.fromkeys(["gradient", *(f"{name}_gradient" for name in (*NAMES[:5], "scale"))], empty)
    return module._backward_arguments(tensors, 8, frames)[1]


def assert_compiles(kernel: str, head_size: int, reference: bool, dtype: torch.dtype, capability: int) -> None:
    arguments = arguments_of(kernel, head_size, reference, dtype)
    function = module._temporal_attention if kernel == "forward" else module._temporal_attention_backward
    types = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    result = compiled(
        function,
        {name: types[x.dtype] for name, x in arguments.items() if isinstance(x, Tensor)},
        {name: x for name, x in arguments.items() if name.isupper()},
        capability,
        num_warps=arguments["num_warps"],
        multiples=[name for name, x in arguments.items() if isinstance(x, int) and x % 16 == 0 and name.islower()],
    )
    assert result.asm["cubin"][:4] == b"\x7fELF"
    assert result.metadata.shared <= 99 * 1024  # of every supported GPU


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_a_gpu(capability: int) -> None:
    assert_compiles("forward", 40, True, torch.float16, capability)


def test_gradients_compile_without_a_gpu() -> None:
    assert_compiles("backward", 40, True, torch.float16, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("head_size", [5, 80, 160])
def test_every_shape_compiles_without_a_gpu(kernel: str, head_size: int, reference: bool, capability: int) -> None:
    assert_compiles(kernel, head_size, reference, torch.bfloat16, capability)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU to compile for, that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Target:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(driver, "_active", Target())


@pytest.mark.usefixtures("hopper")
def test_compilers_see_that_only_the_outputs_are_written() -> None:
    # A tensor that might be written would be copied before every call.
    written: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, _: object) -> Any:
        written.extend(n.kwargs["tensors_to_clone"] for n in graph.graph.nodes if "tensors_to_clone" in n.kwargs)
        return make_boxed_func(graph.forward)

    with FakeTensorMode(allow_non_fake_inputs=True):
        own = [torch.empty(2, 16, 6, 80, requires_grad=True) for _ in range(3)]
        reference = [torch.empty(1, 16, 6, 80, requires_grad=True) for _ in range(2)]
        reference += [torch.empty(16, 80, requires_grad=True) for _ in range(2)]
        reference += [torch.empty(2, 16, 6, requires_grad=True)]

        def attend(*tensors: Tensor) -> Tensor:
            return torch.ops.emt.temporal_attention(*tensors[:3], 2, *tensors[3:])

        aot_function(attend, fw_compiler=look, bw_compiler=look)(*own, *reference).sum().backward()
    gradients = [f"{name}_gradient" for name in (*NAMES[:5], "scale")]
    assert [sorted(names) for names in written] == [["out"], sorted(gradients)]


@pytest.mark.gpu
@pytest.mark.parametrize("reference_frames", [0, 16])
def test_one_graph_under_compile_and_in_a_cuda_graph(reference_frames: int) -> None:
    arguments = inputs(Case(1, 2, 16, reference_frames, 64, 8, 40, torch.float16, True, 0), "cuda")
    expected = temporal_attention_reference(*exact(arguments))
    assert_close(torch.compile(temporal_attention, fullgraph=True)(*arguments), expected, 6.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = temporal_attention(*arguments)
    graph.replay()
    assert_close(out, expected, 6.0)


@pytest.mark.gpu
def test_export_and_ahead_of_time_compilation(tmp_path: Any) -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, *reference: Tensor) -> Tensor:
            return temporal_attention(query, key, value, 8, *reference)

    query, key, value, _, *reference = inputs(Case(1, 2, 16, 16, 64, 8, 40, torch.float16, False, 0), "cuda")
    tensors = tuple(x.contiguous() for x in (query, key, value, *reference))
    program = torch.export.export(Attention(), tensors)
    with toolchain("cuda"):
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "attention.pt2"))
    out = torch._inductor.aoti_load_package(package)(*tensors)
    assert_close(out, temporal_attention_reference(*exact([*tensors[:3], 8, *tensors[3:]])), 6.0)
