"""TensorRT's plugin interface without TensorRT: its own Python code, on top of TensorRT for RTX's compiled classes.

TensorRT's libraries take gigabytes and a GPU; its bindings (`tensorrt-cu13-bindings`, a megabyte) hold all that
registers a plugin, checks its functions and asks them for code and launch, in Python. What that code needs of the
compiled module and TensorRT for RTX lacks, are the expressions of sizes, which the builder hands in.
"""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Expression:
    """A size: a number, known or not."""

    def __init__(self, value: int, constant: bool = True) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value


class Expressions:
    """Makes expressions, as the builder does."""

    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, operation: Any, a: Expression, b: Expression) -> Expression:
        x, y = a.value, b.value
        value = {"PROD": lambda: x * y, "SUM": lambda: x + y, "CEIL_DIV": lambda: -(-x // y)}[operation.name]()
        return Expression(value, a.constant and b.constant)


class Setter(dict):
    """Receives a kernel's extra arguments."""

    nbSymExprs = 0


class _Interface:
    def __init__(self) -> None:
        pass


class Creation(enum.Enum):
    UNKNOWN, PREFER_JIT, PREFER_AOT, STRICT_JIT, STRICT_AOT = range(5)


@contextmanager
def stub() -> Iterator[Any]:
    """The module `tensorrt`, importable meanwhile."""
    rtx = pytest.importorskip("tensorrt_rtx")
    try:
        files = importlib.metadata.files("tensorrt-cu13-bindings") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    folder = next(file for file in files if file.parts[1:] == ("plugin", "__init__.py")).locate().parent

    trt = types.ModuleType("tensorrt")
    trt.__dict__.update({name: x for name, x in vars(rtx).items() if not name.startswith("__")})
    trt.__dict__.update(
        __spec__=importlib.util.spec_from_loader("tensorrt", None),
        __version__=importlib.metadata.version("tensorrt-cu13-bindings"),
        IDimensionExpr=Expression,
        DimsExprs=lambda count: [None] * count,
        IPluginV3QuickAOTBuild=_Interface,
        ISymExpr=_Interface,
        QuickPluginCreationRequest=Creation,
    )
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    plugin = importlib.util.module_from_spec(spec)
    trt.plugin = plugin
    sys.modules |= {"tensorrt": trt, "tensorrt.plugin": plugin}
    try:
        spec.loader.exec_module(plugin)
        yield trt
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
