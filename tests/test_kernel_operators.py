"""How the kernels' operators are registered: at no cost for who does not compile, as PyTorch's own for who does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from kernel_testing import kernel_test
from torch import Tensor

#: Calls every operator, and the gradients of those that have some, on tensors of ones.
FIRST_CALLS = """
import sys

import torch

from emt_kernels import add_matmul, geglu, geglu_linear, group_norm_silu, layer_norm, temporal_attention, upsample_conv

def one(*shape):
    return torch.ones(shape, requires_grad=True)

image, attended = one(2, 8, 4, 4), [one(1, 2, 3, 8) for _ in range(3)]
norm = (one(8), one(8), 2, 1e-5, True)
calls = {
    "add_matmul_": (torch.ones(6, 4), torch.ones(4, 3), torch.ones(6, 3)),
    "geglu": (torch.ones(6, 32),),
    "geglu_linear": (torch.ones(6, 16), torch.ones(32, 16), torch.ones(32)),
    "group_norm_silu": (image, *norm),
    "group_norm_silu_backward": (image, image, *norm),
    "group_norm_silu_of_two": (image, image, one(16), one(16), *norm[2:]),
    "layer_norm": (torch.ones(6, 16), torch.ones(16), torch.ones(16), 1e-5),
    "temporal_attention": (*attended, 2),
    "temporal_attention_backward": (attended[0], *attended, 2),
    "upsample_conv": (torch.ones(1, 8, 4, 4), torch.ones(8, 8, 3, 3), torch.ones(8)),
}
registered = {name[5:] for name in torch._C._dispatch_get_all_op_names() if name.startswith("emt::")}
assert registered == set(calls), registered ^ set(calls)
for name, arguments in calls.items():
    with torch.set_grad_enabled(name in ("group_norm_silu", "temporal_attention")):
        out = getattr(torch.ops.emt, name)(*arguments)
        if torch.is_grad_enabled():
            out.sum().backward()
assert image.grad is not None and attended[0].grad is not None
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""


def test_first_calls_do_not_import_the_compiler() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@kernel_test
def test_a_compiler_does_not_follow_python_into_a_launch(device: str) -> None:
    """As it would from a function that it has left to Python, which it goes on to watch."""
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append([node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    @torch._dynamo.disable(recursive=False)
    def left_to_python(x: Tensor) -> Tensor:
        return torch.ops.emt.geglu(x)

    x = torch.ones(6, 32, device=device)
    out = torch.compile(lambda x: left_to_python(x * 2) + 1, backend=keep)(x)
    torch.testing.assert_close(out, torch.ops.emt.geglu(x * 2) + 1)
    assert graphs == [["mul"], ["add"]]
