"""Hooks into PyTorch's compiler: its phases, memoized analysis of Triton kernels, and a remedy for a fault of it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from emt_kernels.selection import INSTALLED

#: The compiler's own events, of those that begin a phase.
_PHASES = {
    "GraphLowering.run": "lowering",
    "GraphLowering.codegen": "scheduling",
    "PythonWrapperCodegen.generate": "kernels",
    "compile_file": "C++",
}


class Phases:
    """Times the phases of compiling one part, and reports each when it begins.

    Args:
        report: Called with the name of the phase that begins.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
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
            self._report(phase)

    def summary(self) -> str:
        """Seconds of all phases; ends the last one."""
        self.begin("")
        return ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self._seconds.items())

    @contextlib.contextmanager
    def of_compiler(self) -> Iterator[None]:
        """Follow PyTorch's compiler meanwhile, by the events that it times itself with."""
        from torch._dynamo.utils import ChromiumEventLogger  # engines that are there run without the compiler

        log = ChromiumEventLogger.log_event_start

        def watch(logger: Any, event_name: str, *arguments: Any, **options: Any) -> None:
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
def rare_collections() -> Iterator[None]:
    """Context manager: Python looks for garbage in cycles a hundredth as often, and not among what there is already.

    A graph of a network is hundreds of thousands of objects, which a collection goes through, and of which it frees
    next to nothing.
    """
    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100 * usual[0], *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


@contextlib.contextmanager
def remembered_writes() -> Iterator[None]:
    """Context manager: memoize the compiler's analysis of which arguments a Triton kernel writes to.

    It translates the kernel for that, 0.1 s each time. A graph has some 350 calls, of some tens of kinds, and each is
    analyzed several times.
    """
    if not INSTALLED:
        yield
        return
    from torch._higher_order_ops import triton_kernel_wrap

    # PyTorch 2.12 has the second name, of a function that also finds what is read.
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
    """The properties of an argument that Triton's translation depends on."""
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


@contextlib.contextmanager
def declared_size_arrays() -> Iterator[None]:
    """Context manager: all arrays of sizes that generated C++ names are declared in it, whatever PyTorch's version.

    The code generator remembers the name of an array by the address of the function, or of the buffer, that the
    declaration was written with (pytorch/pytorch#178147, #193621, #193628). Once that object is freed, another one at
    the same address gets a name that was declared elsewhere, and the C++ does not compile. Here all of them are kept
    alive as long as the generator is, so that their addresses differ.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    if not loses_declarations():
        yield
        return
    name_array = CppWrapperCpu.codegen_int_array_var

    def name_array_of_kept(self: Any, int_array: str, writeline: Any, *rest: Any, **options: Any) -> str:
        kept = vars(self).setdefault("_emt_kept", {})
        # A bound method is a new object at each access: the first one stands for all of its owner's.
        owner = getattr(writeline, "__self__", writeline)
        writeline = kept.setdefault((id(owner), getattr(writeline, "__name__", "")), writeline)
        return name_array(self, int_array, writeline, *rest, **options)

    with _replaced(CppWrapperCpu, "codegen_int_array_var", name_array_of_kept):
        yield


def loses_declarations() -> bool:
    """Return whether PyTorch's code generator takes a buffer of code for another one that had the same address."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    class Buffer:
        def __init__(self, lines: list[str]) -> None:
            self.lines = lines

        def writeline(self, line: str) -> None:
            self.lines.append(line)

    def method(lines: list[str]) -> Callable[[str], None]:
        return Buffer(lines).writeline

    def closure(lines: list[str]) -> Callable[[str], None]:
        return lambda line: lines.append(line)

    def address(writeline: Any) -> int:
        return id(getattr(writeline, "__self__", writeline))

    for make in (method, closure):
        generator: Any = object.__new__(CppWrapperCpu)
        generator.int_array_id, generator.declared_int_array_vars = itertools.count(), set()
        generator.codegen_int_array_var_cache = {}
        for _ in range(100):  # the first try nearly always: freed memory goes to the next object of its size
            writeline = make([])
            freed = address(writeline)
            generator.codegen_int_array_var("{1L, }", writeline, True)
            del writeline
            lines: list[str] = []
            writeline = make(lines)
            if address(writeline) == freed:
                generator.codegen_int_array_var("{1L, }", writeline, True)
                if not lines:
                    return True
                break
    return False
