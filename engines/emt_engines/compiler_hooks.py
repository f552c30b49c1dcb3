"""Watches and helps PyTorch's compiler: which phase it is in, and what it need not find out again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import ChromiumEventLogger

from emt_kernels.selection import INSTALLED

#: The compiler's own events, of those that begin a phase.
_PHASES = {
    "GraphLowering.run": "lowering",
    "GraphLowering.codegen": "scheduling",
    "PythonWrapperCodegen.generate": "kernels",
    "compile_file": "C++",
}


class Phases:
    """Times the phases of compiling one part, and tells of each when it begins.

    Args:
        tell: Is told the name of the phase that begins.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._seconds: dict[str, float] = {}
        self._now, self._since = "", time.monotonic()

    def begin(self, phase: str) -> None:
        """End the phase that there is, and begin another one, or go on with it."""
        if phase == self._now:
            return
        now = time.monotonic()
        if self._now:
            self._seconds[self._now] = self._seconds.get(self._now, 0.0) + now - self._since
        self._now, self._since = phase, now
        if phase:
            self._tell(phase)

    def summary(self) -> str:
        """Seconds of all phases; ends the last one."""
        self.begin("")
        return ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self._seconds.items())

    @contextlib.contextmanager
    def of_compiler(self) -> Iterator[None]:
        """Follow PyTorch's compiler meanwhile, by the events that it times itself with."""
        log = ChromiumEventLogger.log_event_start

        def watch(logger: ChromiumEventLogger, event_name: str, *arguments: Any, **options: Any) -> None:
            if event_name in _PHASES:
                self.begin(_PHASES[event_name])
            log(logger, event_name, *arguments, **options)

        with _replaced(ChromiumEventLogger, "log_event_start", watch):
            yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def remembered_writes() -> Iterator[None]:
    """Let the compiler find out once, and not for every call, which arguments a Triton kernel writes to.

    It translates the kernel for that, 0.1 s each time. A graph has some 350 calls, of some tens of kinds, and it asks
    several times for each.
    """
    if not INSTALLED:
        yield
        return
    from torch._higher_order_ops import triton_kernel_wrap

    # Named anew in PyTorch 2.12, where it also tells what is read.
    names = [n for n in ("identify_mutated_tensors", "identify_accessed_tensors") if hasattr(triton_kernel_wrap, n)]
    with contextlib.ExitStack() as patches:
        for name in names:
            find = _remembering(getattr(triton_kernel_wrap, name))
            patches.enter_context(_replaced(triton_kernel_wrap, name, find))
        yield


def _remembering(find: Callable[..., Any]) -> Callable[..., Any]:
    from triton.runtime.jit import JITFunction

    known: dict[Any, Any] = {}

    def remember(kernel: Any, arguments: dict[str, Any], *others: Any) -> Any:
        if isinstance(kernel, JITFunction):
            function, given = kernel, arguments
        else:  # a call that names its number of warps comes, anew each time, as a choice among one setting
            function, given = kernel.fn, arguments | (kernel.configs[0].kwargs if kernel.configs else {})
        if not isinstance(function, JITFunction) or any(others):
            return find(kernel, arguments, *others)
        key = function, *((p.name, _kind(given.get(p.name), p.is_constexpr)) for p in function.params)
        if key not in known:
            known[key] = find(kernel, arguments, *others)
        return known[key]

    return remember


def _kind(argument: Any, constant: bool) -> Any:
    """Triton's specialization key of an argument."""
    from torch._inductor.ir import TensorBox

    if isinstance(argument, torch.Tensor):
        return "tensor", argument.dtype
    if isinstance(argument, TensorBox):
        return "tensor", argument.get_dtype()
    if type(argument) is int and not constant:
        return "integer", argument == 1, argument % 16 == 0, abs(argument) < 2**31
    if isinstance(argument, bool | int | float | str) or argument is None:
        return type(argument), argument
    return "symbol"
