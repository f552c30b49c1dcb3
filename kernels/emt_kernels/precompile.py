"""Compile Triton kernels before their first launch, in parallel.

Triton compiles each specialization of a kernel when it is first launched, one after another. A network at Stable
Diffusion 1.5 size launches some sixty of them, half a second of one core each. So a first pass only records the
launches (`record_launches`); `Launches.compile` compiles all of them in threads, which overlap because Triton's passes
release the GIL and its assembler is a process of its own; the real launches then find their kernels compiled.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emt_kernels import selection


@dataclass(frozen=True)
class _TensorLike:
    """Stand-in for a tensor argument: what Triton specializes on, without the memory."""

    dtype: torch.dtype
    offset: int  # of its address from a multiple of 16 bytes

    def data_ptr(self) -> int:
        return self.offset


class Launches:
    """Recorded kernel launches, one for each specialization key."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def add(self, kernel: Any, arguments: dict[str, Any]) -> None:
        """Record a launch.

        Args:
            kernel: a `triton.jit` function.
            arguments: of the launch by name, including launch options such as `num_warps`.
        """
        arguments = {
            name: _TensorLike(value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        parameters = {parameter.name: parameter for parameter in kernel.params}
        kinds = [(name, _specialization(value, parameters.get(name))) for name, value in arguments.items()]
        self._recorded.setdefault((kernel, *kinds), (kernel, arguments))

    def compile(self, device: torch.device, threads: int | None = None) -> list[Exception]:
        """Compile all recorded kernels for a device, or load them from Triton's cache.

        Args:
            device: the GPU that will run them.
            threads: number of compiling threads; default: the processors available to this process.

        Returns:
            The errors. They may be ignored: such a kernel is compiled again by its launch, which raises then.
        """

        def compile_one(kernel: Any, arguments: dict[str, Any]) -> None:
            # A thread starts with the first GPU, whatever the current one of its parent is.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                kernel.warmup(grid=(1,), **arguments)

        # The slowest first: compile time grows with the number of parameters.
        ordered = sorted(self._recorded.values(), key=lambda recorded: -len(recorded[0].params))
        with ThreadPoolExecutor(min(threads or processors(), len(ordered)) or 1) as pool:
            jobs = [pool.submit(compile_one, *recorded) for recorded in ordered]
        errors = []
        for recorded, job in zip(ordered, jobs, strict=True):
            error = job.exception()
            if isinstance(error, SystemError):
                # Before Python 3.11.8, ast.parse is not thread-safe (python/cpython#106905).
                try:
                    compile_one(*recorded)
                    continue
                except Exception as again:
                    error = again
            if isinstance(error, Exception):
                errors.append(error)
        return errors


def _specialization(value: Any, parameter: Any) -> Any:
    """Triton's specialization key of an argument; for an int: equal to 1, divisible by 16, fits in 32 bits."""
    if parameter is None or parameter.is_constexpr or isinstance(value, _TensorLike):
        return value
    if hasattr(value, "block_shape"):  # a tensor's descriptor
        return value.base.dtype, tuple(value.block_shape)
    if not isinstance(value, int) or parameter.do_not_specialize:
        return type(value)
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31


class _Recorder:
    """Stand-in for a kernel that records its launches."""

    def __init__(self, kernel: Any, launches: Launches) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        names = [parameter.name for parameter in self._kernel.params]
        return lambda *first, **others: self._launches.add(self._kernel, dict(zip(names, first)) | others)


@contextlib.contextmanager
def record_launches() -> Iterator[Launches]:
    """Context manager: record this thread's launches instead of doing them; their outputs stay uninitialized."""
    launches, thread = Launches(), threading.get_ident()
    previous = selection.launch_hook

    def hook(kernel: Any) -> Any:
        return _Recorder(kernel, launches) if threading.get_ident() == thread else kernel

    selection.launch_hook = hook
    try:
        yield launches
    finally:
        selection.launch_hook = previous


def processors() -> int:
    """Number of processors available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
