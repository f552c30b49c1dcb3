"""The matmul that accumulates in place: eagerly, as an operator, and in compiled code without a copy."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emt.backbones.sd15.layers import LayerNorm
from emt.backbones.sd15.passes import FusedPass
from emt_kernels.add_matmul import add_matmul_


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in ((6, 4), (4, 3), (6, 3)))  # type: ignore[return-value]


def test_it_adds_in_place() -> None:
    total, weight, x = tensors()
    expected, at = total + x @ weight.t(), total.data_ptr()
    add_matmul_(total, weight, x)
    torch.testing.assert_close(total, expected)
    assert total.data_ptr() == at


def test_the_operator_is_registered_as_compilers_need_it() -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.emt.add_matmul_.default, tensors(), test_utils=tests)


class Stream(nn.Module):
    """Two layers that add to a residual stream, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(4, 8)
        self.norms = nn.ModuleList([LayerNorm(8) for _ in range(3)])
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x, bias, run = self.proj_in(x), None, FusedPass(True, 8)
        for norm, layer in zip(self.norms, self.layers):
            bias = run.add_linear(x, bias, layer, norm(x, shift=bias))
        return self.norms[2](x, shift=bias)


@torch.no_grad()
def test_compiled_code_adds_in_place_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ahead of time, with any number of rows: the operator is called, and no buffer is copied for it."""
    torch.manual_seed(0)
    module, x = Stream().eval(), torch.randn(3, 5, 4)
    expected = module(x)
    samples = torch.export.Dim("samples", min=1, max=8)
    exported = torch.export.export(module, (x,), strict=False, dynamic_shapes=({0: samples},))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called.count("emt.add_matmul_.default") == 2
    torch._logging.set_logs(output_code=True)
    try:
        with caplog.at_level(logging.DEBUG, logger="torch._inductor"):
            # With the flags of engines, which share their precompiled headers: those take longer than all else.
            flags = {"aot_inductor.compile_wrapper_opt_level": "O0"}
            file = str(tmp_path / "stream.pt2")
            torch._inductor.aoti_compile_and_package(exported, package_path=file, inductor_configs=flags)
    finally:
        torch._logging.set_logs()
    # A copy would be another buffer: both matmuls add to the one that the first layer wrote.
    totals = re.findall(r"call_function\(.*?AtenTensorHandle, 3>\{.*?(buf\d+)", caplog.text)
    assert len(totals) >= 2  # the code is logged once or twice
    assert len(set(totals)) == 1
    code = next(record.getMessage() for record in caplog.records if "run_impl(" in record.getMessage())
    assert not re.search(r"clone\w*\(", code.split("run_impl(")[-1])  # by its name in code: a folder may be called so
    package = torch._inductor.aoti_load_package(file)
    for given in (x, x[:1], torch.cat([x, x])):
        torch.testing.assert_close(package(given), module(given))
    torch.testing.assert_close(package(x), expected)
