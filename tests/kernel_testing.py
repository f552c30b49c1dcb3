"""Where the tests of kernels run: interpreted on the CPU, compiled on a GPU, and compiled for GPUs that are not here.

Triton decides when it is imported whether it interprets kernels or compiles them, so that one process does one of
the two. The process of the tests compiles; what is interpreted runs in a second process, one for all tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import multiprocessing
import os
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch

# Ampere (A100; RTX 30), Ada, Hopper, Blackwell (B200; RTX 50).
CAPABILITIES = (80, 86, 89, 90, 100, 120)
#: For a test of kernels that are defined only where Triton is: builds of PyTorch for GPUs bring it, others do not.
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` gives with NaN, so that nothing left unwritten passes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def kernel_test(test: Callable[..., None]) -> Callable[..., None]:
    """A test of a kernel that takes `device`: "cpu", interpreted, and "cuda", compiled (marker `gpu`).

    Decorate last, that is above hypothesis and `pytest.mark.parametrize`. A test that fails where it is interpreted
    shows the traceback of that process. Fixtures and parameters must be picklable::

        @kernel_test
        @given(case=cases())
        def test_forward(device: str, case: Case) -> None: ...
    """

    def run(device: str, **given: Any) -> None:
        if device == "cuda":
            if not torch.cuda.is_available():
                pytest.skip("PyTorch finds no CUDA GPU")
            test(device=device, **given)
            return
        pytest.importorskip("triton")
        problem = _interpreter().submit(_run_interpreted, test.__module__, test.__name__, given).result()
        if problem:
            pytest.fail(problem, pytrace=False)

    run.__name__ = run.__qualname__ = test.__name__
    run.__module__, run.__doc__ = test.__module__, test.__doc__
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    run.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
    run.interpreted = test  # type: ignore[attr-defined]
    return pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])(run)


@functools.lru_cache(maxsize=1)
def _interpreter() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    # The pool starts its process at the first call, with the environment of that moment. One thread: blocks are tiny.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
        pool.submit(os.getpid).result()
    return pool


def _run_interpreted(module: str, name: str, given: Mapping[str, Any]) -> str:
    """Run a test in this process; return its traceback, empty if it passes."""
    try:
        getattr(importlib.import_module(module), name).interpreted(device="cpu", **given)
    except BaseException:  # pytest's own outcomes too
        return traceback.format_exc()
    return ""


def compiled(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int,
    num_stages: int = 3,
    multiples: Collection[str] = (),
    kinds: Mapping[str, str] | None = None,
) -> Any:
    """Compile a kernel for GPUs of a compute capability, none of which need be here; return what Triton made.

    Args:
        kernel: a function under `triton.jit`.
        pointers: type of each tensor, such as {"x": "fp16"}; taken to be 16-byte aligned, as PyTorch's memory is.
        constants: value of each `tl.constexpr`, and None for a tensor that is left out.
        capability: such as 90 for 9.0.
        num_warps: of the launch.
        num_stages: of the launch.
        multiples: parameters that are multiples of 16, as sizes and strides of real networks are.
        kinds: Triton's type of parameters that are neither, such as {"x": "tensordesc<fp16[64, 64]>"}.

    Every other parameter is an int32. Triton's assembler has to accept the result: `.asm["cubin"]` is machine code.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    types = (
        dict(kinds or {})
        | {name: f"*{kind}" for name, kind in pointers.items()}
        | dict.fromkeys(constants, "constexpr")
    )
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *multiples) if name not in constants
    }
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
