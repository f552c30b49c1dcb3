"""Which body a kernel's function runs: the Triton kernel or its PyTorch reference."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

Kernels = Literal["auto", "triton", "reference"]

# What is known of the machine is found out once, and not through a cache of functools nor importlib in a call:
# torch.compile follows neither.
#: Whether Triton is there; kernels are defined only then.
INSTALLED = importlib.util.find_spec("triton") is not None
_requested: Kernels = "auto"
_problem: str | None = None
_substitutes: dict[str, Callable[..., Any]] = {}
#: Maps a kernel to what is launched in its place (`emt_kernels.precompile.record_launches`).
launch_hook: Callable[[Any], Any] | None = None


def unavailable() -> str:
    """Reason why Triton's kernels cannot run on this machine; empty if they can."""
    global _problem
    if _problem is None:
        _problem = _find_problem()
    return _problem


def _find_problem() -> str:
    if not INSTALLED:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, Triton's kernels here need 8.0 or newer"
    return ""


def select(kernels: Kernels) -> tuple[str, str]:
    """Choose for this process what the kernels' functions run.

    Args:
        kernels: "triton"; "reference", plain PyTorch; or "auto", Triton's kernels where they can run.

    Returns:
        What was chosen, "triton" or "reference", and why.

    Raises:
        RuntimeError: "triton" was given and its kernels cannot run here.
    """
    global _requested
    problem = unavailable()
    if kernels == "triton" and problem:
        raise RuntimeError(f"Triton's kernels cannot run here: {problem}")
    _requested = kernels
    if kernels == "reference":
        return "reference", "requested"
    return ("reference", problem) if problem else ("triton", "requested" if kernels == "triton" else "they run here")


def use_triton(x: Tensor) -> bool:
    """Return whether a public kernel function launches its Triton kernel for `x`; none does inside `substitutes`."""
    return not _substitutes and x.is_cuda and _requested != "reference" and not unavailable()


def is_fused(x: Tensor) -> bool:
    """Return whether functions without operators launch kernels for `x`: at inference, and not for a compiler."""
    return (
        use_triton(x)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and x.numel() < 2**31
    )


@contextlib.contextmanager
def substitutes(**functions: Callable[..., Any]) -> Iterator[None]:
    """Have kernels' functions of these names call others meanwhile, as exporters to graphs with own operators need."""
    before = dict(_substitutes)
    _substitutes.update(functions)
    try:
        yield
    finally:
        _substitutes.clear()
        _substitutes.update(before)


def substitute(name: str) -> Callable[..., Any] | None:
    """The function that replaces a kernel and its reference; None outside of `substitutes`."""
    return _substitutes.get(name)


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1), as the tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Calls(threading.local):
    """State of each thread: `real` while it runs an operator on tensors that hold numbers, where nothing is traced."""

    real = False


_calls = _Calls()


def custom_op(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register an operator that compilers take as it is, as `torch.library.custom_op` does.

    That one's kernels import PyTorch's compiler at their first call, to keep it from following them, which takes as
    long as importing PyTorch itself; here a compiler brings itself along.

    Args:
        name: of the operator, with its namespace.
        mutates_args: names of the tensors that it writes to.
    """

    def register(body: Callable[..., Any]) -> Any:
        return _register(name, body, body, mutates_args)

    return register


def triton_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register an operator that launches kernels by `wrap_triton`, which compilers see into.

    `torch.library.triton_op` does the same, but imports PyTorch's compiler for it, as `custom_op` says.

    Args:
        name: of the operator, with its namespace.
    """

    def register(body: Callable[..., Any]) -> Any:
        @functools.wraps(body)
        def compute(*args: Any, **options: Any) -> Any:
            before, _calls.real = _calls.real, True
            try:
                return body(*args, **options)
            finally:
                _calls.real = before

        operator = _register(name, body, compute, ())
        operator.register_torch_dispatch(FunctionalTensorMode, functools.partial(_decompose, name, body))
        return operator

    return register


def _register(name: str, body: Callable[..., Any], compute: Callable[..., Any], mutates_args: Iterable[str]) -> Any:
    """Define the operator of `body`'s signature without a kernel, then have it call `compute` on every device."""

    hidden: Callable[..., Any] | None = None

    def run(*args: Any, **options: Any) -> Any:
        nonlocal hidden
        if "torch._dynamo" not in sys.modules:
            return compute(*args, **options)
        # A compiler that has left a function to Python must not follow it through the operator into a launch.
        if hidden is None:
            hidden = torch.compiler.disable(compute)
        return hidden(*args, **options)

    schema = torch.library.infer_schema(body, mutates_args=tuple(mutates_args))
    operator = torch.library.custom_op(name, body, mutates_args=mutates_args, schema=schema, device_types=())
    torch.library.impl(name, "default", run)
    return operator


def _decompose(name: str, body: Callable[..., Any], mode: Any, op: Any, types: Any, args: Any, options: Any) -> Any:
    """Trace into an operator where a compiler makes tensors functional; `torch.export` alone keeps it whole."""
    from torch._library import triton as known
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    # Their source is part of the key of compiled code. It is read and parsed for that: once an operator, not each call.
    if hasattr(known, "get_inner_triton_kernels") and name not in known.triton_ops_to_kernels:
        known.triton_ops_to_kernels[name] = known.get_inner_triton_kernels(body)
    if custom_triton_ops_decomposition_disabled():
        return mode.__torch_dispatch__(op, types, args, options)
    if any(kind not in (Tensor, FunctionalTensor) and not issubclass(kind, FakeTensor) for kind in types):
        return NotImplemented
    with mode:
        return body(*args, **options)


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton` where a call is traced; the kernel itself on tensors that hold numbers.

    Interpreted kernels, which that refuses, are returned as they are, too.
    """
    if (other := untraced(kernel)) is not kernel:
        return other
    return kernel if _calls.real or interpreted() else torch.library.wrap_triton(kernel)


def untraced(kernel: Any) -> Any:
    """A kernel for a launch that is never traced: itself, or what stands in for it."""
    return kernel if launch_hook is None else launch_hook(kernel)
