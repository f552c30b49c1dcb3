"""CUDA graphs of calls of a network: capture, replay, and the static inputs that they read."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from emt.errors import EmtError
from emt.features import MotionFeatures, PreparedMotion, TextFeatures, layer_tensors, tensors_of

T = TypeVar("T")

#: Calls of a shape before one that keeps the device busy is captured: those of a clip of 25 steps.
CALLS_BEFORE_CAPTURE = 25
#: Share of a call's time that a device which is kept busy goes on computing after the host's last launch.
_KEPT_BUSY = 0.3


class Recorder(Protocol):
    """Captures a computation once, so that it can be replayed at less cost; its graphs share one memory pool.

    Attributes:
        calls_before: Calls of a shape that are made before one may be captured, the last of them by `keeps_busy`.
    """

    calls_before: int

    def keeps_busy(self, compute: Callable[[], T]) -> tuple[T, bool]:
        """Result of a computation, and whether the host launched it faster than the device computed it."""
        ...

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that computes again, on the tensors that were read, and the tensor with the result."""
        ...


class CudaGraphs:
    """Captures CUDA graphs on the current device."""

    calls_before = 2  # libraries choose their kernels in the first

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def keeps_busy(self, compute: Callable[[], T]) -> tuple[T, bool]:
        """Result of a computation, and whether the host launched it faster than the device computed it.

        Waits for the device before and after.
        """
        torch.cuda.synchronize()
        begun = time.perf_counter()
        found = compute()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        return found, ended - launched > _KEPT_BUSY * (ended - begun)

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Replay and result of a computation that waits for nothing on the host.

        Raises:
            EmtError: if the first replay gives another result than the computation itself.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # libraries choose their kernels now, and Triton compiles its own
            expected = compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads go on using the GPU meanwhile: they save references.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = compute()
        finally:
            torch.cuda.set_stream(current)  # which it does not come back to by itself if ending the capture fails
        graph.replay()
        change = torch.linalg.vector_norm(output.float() - expected.float())
        allowed = 1e-2 * torch.linalg.vector_norm(expected.float())
        if bool(change > allowed):  # not so if there are NaN, which are reported with the clip
            raise EmtError(
                f"a captured call of the network does not repeat its result: off by {change:.3g} of {allowed:.3g}",
                "Use --memory low, which captures nothing, and report this with the output of: emt doctor",
            )
        return graph.replay, output


@dataclass
class Calls:
    """Calls of one shape, of which some are made before they are captured.

    Capturing takes the time of some three calls: one to compare with, the one that is captured, and its replay. Where
    launches take the host longer than their kernels the device, the first clip earns that back. Where the device is
    kept busy a replay saves almost nothing, so that a shape of one clip is not captured; one that comes often is, since
    a replay is not held up by what else the host does.

    Args:
        before: calls that are made before one may be captured.
        often: calls after which one is captured even if the device is kept busy; None for never.
    """

    before: int
    often: int | None = CALLS_BEFORE_CAPTURE
    made: int = 0
    kept_busy: bool = False

    @property
    def is_capture_due(self) -> bool:
        """Return whether the next call is to be captured."""
        enough = not self.kept_busy or (self.often is not None and self.made >= self.often)
        return self.made >= self.before and enough

    def make(self, recorder: Recorder, compute: Callable[[], T]) -> T:
        """Result of a call that is not captured."""
        self.made += 1
        if self.made != recorder.calls_before:
            return compute()
        found, self.kept_busy = recorder.keeps_busy(compute)
        return found


@dataclass
class StaticInput:
    """Text or motion at the addresses that captured calls read, and whose content is there."""

    value: Any
    source: weakref.ref[Any]

    def fill(self, value: TextFeatures | PreparedMotion) -> None:
        """Copy the content of `value` here, unless it is here already.

        Raises:
            RuntimeError: `value` shares these tensors, and another one has been written over it.
        """
        if self.source() is value:
            return
        self.check(value)
        torch._foreach_copy_(list(tensors_of(self.value)), list(tensors_of(value)))
        self.source = weakref.ref(value)

    def check(self, value: TextFeatures | PreparedMotion) -> None:
        """Raise RuntimeError if `value` shares these tensors, and another one has been written over it."""
        shared = any(a is b for a, b in zip(tensors_of(self.value), tensors_of(value)))
        if shared and self.source() is not value:
            raise RuntimeError("this prepared motion has given way to another one of its shape: prepare it again")


@dataclass
class CapturedCall:
    """A captured call of the network and the tensors that it reads and writes."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    output: Tensor
    text: StaticInput | None = None
    motion: StaticInput | None = None
    kept: list[Tensor] = field(default_factory=list)  # what else it writes: deep features, or those of references


def shapes_of(features: TextFeatures | MotionFeatures | PreparedMotion) -> tuple[Any, ...]:
    """Shapes and dtypes of the first and the last layer's tensors, which decide those of all."""
    layers = list(features.layers.values())
    return tuple((x.shape, x.dtype) for layer in layers[:1] + layers[-1:] for x in layer_tensors(layer))


def out_of_memory(error: BaseException | None) -> BaseException | None:
    """The out-of-memory error that made a capture fail, which ending it may hide behind another one; None for none."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        error = error.__context__
    return error
