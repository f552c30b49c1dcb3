"""Compiling kernels ahead, in parallel.

Triton compiles each specialisation of a kernel when it is first launched, one after another.
A network at Stable Diffusion 1.5 size launches some sixty of them, half a second of one core each. So a first pass
only collects what would be launched; all of it is compiled in threads, which overlap since Triton's passes let go of
Python's lock and its assembler is a process; and the launches proper then find their kernels compiled.
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
class _Like:
    """What Triton compiles for of a tensor, without its memory."""

    dtype: torch.dtype
    offset: int  # of its address from a multiple of 16 bytes

    def data_ptr(self) -> int:
        return self.offset


class Launches:
    """Launches that were asked for, one of each that Triton compiles apart."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self._wanted)

    def add(self, kernel: Any, arguments: dict[str, Any]) -> None:
        """Remember a launch.

        Args:
            kernel: a function under `triton.jit`.
            arguments: of the launch, by name, its options with them.
        """
        arguments = {
            name: _Like(value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        parameters = {parameter.name: parameter for parameter in kernel.params}
        kinds = [(name, _kind(value, parameters.get(name))) for name, value in arguments.items()]
        self._wanted.setdefault((kernel, *kinds), (kernel, arguments))

    def compile(self, device: torch.device, threads: int | None = None) -> list[Exception]:
        """Compile all of them for a device, or read them from Triton's cache.

        Args:
            device: the GPU that they are to run on.
            threads: that compile; as many as there are processors for this process unless given.

        Returns:
            What failed. Nothing is lost by that: such a kernel is compiled again when it is launched, and raises then.
        """

        def compile_one(kernel: Any, arguments: dict[str, Any]) -> None:
            # A thread starts with the first GPU, whatever the current one of its parent is.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                kernel.warmup(grid=(1,), **arguments)

        # Those that take longest first: they are the ones with most parameters.
        ordered = sorted(self._wanted.values(), key=lambda wanted: -len(wanted[0].params))
        with ThreadPoolExecutor(min(threads or processors(), len(ordered)) or 1) as pool:
            jobs = [pool.submit(compile_one, *wanted) for wanted in ordered]
        errors = []
        for wanted, job in zip(ordered, jobs, strict=True):
            error = job.exception()
            if isinstance(error, SystemError):
                # Until Python 3.11.8, threads that parse at once can disturb each other (python/cpython#106905).
                try:
                    compile_one(*wanted)
                    continue
                except Exception as again:
                    error = again
            if isinstance(error, Exception):
                errors.append(error)
        return errors


def _kind(value: Any, parameter: Any) -> Any:
    """What Triton compiles apart of an argument: of a whole number whether it is 1, a multiple of 16, and long."""
    if parameter is None or parameter.is_constexpr or isinstance(value, _Like):
        return value
    if hasattr(value, "block_shape"):  # a tensor's descriptor
        return value.base.dtype, tuple(value.block_shape)
    if not isinstance(value, int) or parameter.do_not_specialize:
        return type(value)
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31


class _Collector:
    """Stands in for a kernel: takes its launches down."""

    def __init__(self, kernel: Any, launches: Launches) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        names = [parameter.name for parameter in self._kernel.params]
        return lambda *first, **others: self._launches.add(self._kernel, dict(zip(names, first)) | others)


@contextlib.contextmanager
def collected() -> Iterator[Launches]:
    """Within, this thread's launches are collected, and none is done: what they would write is undefined."""
    launches, thread = Launches(), threading.get_ident()
    before = selection.stand_in

    def stand_in(kernel: Any) -> Any:
        return _Collector(kernel, launches) if threading.get_ident() == thread else kernel

    selection.stand_in = stand_in
    try:
        yield launches
    finally:
        selection.stand_in = before


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
