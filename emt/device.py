"""The device that a run computes on: its choice, its name and its memory."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emt.errors import EmtError

if TYPE_CHECKING:
    import torch

_MOST_INTERVALS = 256  # of a clock, before those that are over are summed
#: Held in CUDA's first calls: a driver that finds no GPU undoes its start, and another thread's call may be in it.
_STARTING = threading.Lock()


#: Precisions of the network, and torch's names of their dtypes.
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Device:
    """An opened device.

    Attributes:
        torch_device: For torch: `cuda:0`, `mps` or `cpu`.
        name: What it is, as recorded in results: a GPU's name, or `cpu`.
        precision: fp32, fp16 or bf16.
        kernels: triton or reference (`emt_kernels.selection`).
        why: Why these kernels.
    """

    torch_device: str
    name: str
    precision: str
    kernels: str = "reference"
    why: str = ""

    @classmethod
    def open(cls, device: str, precision: str, kernels: str = "auto") -> Device:
        """Choose and check a device.

        Args:
            device: auto, cuda, cuda:N, mps or cpu; auto takes the first there is, in the order cuda, mps, cpu.
            precision: auto is fp16 on a GPU and fp32 on a CPU.
            kernels: auto, triton or reference; chosen for the whole process.

        Raises:
            EmtError: this machine has no such device, there is no such precision, or Triton's kernels are requested and
                do not run on the device.
        """
        import torch

        with _STARTING:
            count = (
                torch.cuda.device_count() if device.startswith(("auto", "cuda")) and torch.cuda.is_available() else 0
            )
        if device == "auto":
            device = "cuda" if count else "mps" if torch.backends.mps.is_available() else "cpu"
        if device.startswith("cuda"):
            place = device if ":" in device else "cuda:0"
            if int(place.split(":")[1]) >= count:
                found = f"PyTorch finds {count} CUDA device{'' if count == 1 else 's'}"
                raise EmtError(f"there is no device {device}: {found}", "Use --device cpu, or run `emt doctor`.")
            name = torch.cuda.get_device_name(place)
        elif device == "mps":
            if not torch.backends.mps.is_available():
                raise EmtError("there is no device mps on this machine", "Use --device cpu, or run `emt doctor`.")
            place, name = "mps", "mps"
        else:
            place, name = "cpu", "cpu"
        if precision == "auto":
            precision = "fp32" if place == "cpu" else "fp16"
        if precision not in PRECISIONS:
            raise EmtError(f"there is no precision {precision}", f"Allowed are auto, {', '.join(PRECISIONS)}.")
        return cls(place, name, precision, *_choose_kernels(place, kernels))

    @property
    def is_gpu(self) -> bool:
        """Return whether it has memory of its own that CUDA measures."""
        return self.torch_device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch names it."""
        import torch

        return getattr(torch, PRECISIONS[self.precision])

    def start_measuring(self) -> None:
        """Peak memory is counted from here on."""
        if self.is_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def synchronize(self) -> None:
        """Wait until the device has done all of its work, so that wall-clock timings are true."""
        if self.is_gpu:
            import torch

            torch.cuda.synchronize(self.torch_device)

    def mark(self) -> Callable[[], None]:
        """Record a CUDA event on the current stream; the returned function blocks until it has completed."""
        if not self.is_gpu:
            return lambda: None
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return event.synchronize

    def memory(self) -> tuple[int, int, int]:
        """Bytes in use, at the peak (on a CPU: of the process since its start), and to be had in all."""
        if self.is_gpu:
            import torch

            free, _ = torch.cuda.mem_get_info(self.torch_device)
            used, reserved = (
                torch.cuda.memory_allocated(self.torch_device),
                torch.cuda.memory_reserved(self.torch_device),
            )
            return used, torch.cuda.max_memory_allocated(self.torch_device), free + reserved
        peak = _peak_memory()
        return peak, peak, _system_memory()

    def beside(self) -> AbstractContextManager[Any]:
        """Context manager: copies to and from a GPU go beside its computing, not in line with it."""
        if not self.is_gpu:
            return nullcontext()
        import torch

        # Streams of this priority are others than those that graphs are captured on.
        return torch.cuda.stream(torch.cuda.Stream(self.torch_device, priority=-1))

    def load_libraries(self) -> None:
        """Have the GPU's libraries for matmuls and convolutions loaded, which takes the first call of each a while.

        On the current stream; their handles and workspaces go on to the thread that computes.
        """
        if self.is_gpu:
            import torch

            half = torch.float16
            with torch.no_grad(), torch.cuda.device(self.torch_device):
                image = torch.zeros(1, 8, 16, 16, device=self.torch_device, dtype=half)
                image = image.contiguous(memory_format=torch.channels_last)
                torch.nn.functional.conv2d(image, image.new_zeros(8, 8, 3, 3), padding=1)
                matrix = image.new_zeros(64, 64)
                torch.nn.functional.linear(matrix, matrix, matrix[0])

    def forget(self) -> None:
        """Give unused memory back after a failure."""
        if self.is_gpu:
            import torch

            torch.cuda.empty_cache()


def cuda_driver() -> Any:
    """The CUDA driver's library; None where there is none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def start_gpu(driver: Any, device: str) -> bool:
    """Start CUDA and a GPU's context, which PyTorch uses in this process; needs no PyTorch.

    It takes a second or more, in which other threads run: one can import PyTorch meanwhile.

    Args:
        driver: From `cuda_driver`.
        device: auto, cuda or cuda:N.

    Returns:
        Whether there is such a GPU; what is wrong with it, PyTorch says later.
    """
    gpu, context = ctypes.c_int(), ctypes.c_void_p()
    number = int(device.partition(":")[2] or 0)
    with _STARTING:
        return (
            driver.cuInit(0) == 0
            and driver.cuDeviceGet(ctypes.byref(gpu), number) == 0
            and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu) == 0
        )


class BusyClock:
    """Seconds in which a device computed.

    On a GPU they are those between events before and after its kernels, so that they cost the host nothing; elsewhere,
    where calls return when they have computed, the clock's.

    Args:
        gpu: The device as torch names it, such as `cuda:0`; None for any that is none.
        now: Clock in seconds.
    """

    def __init__(self, gpu: str | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        self._gpu, self._now = gpu, now
        self._seconds = 0.0
        self._begun: Any = None
        self._intervals: list[tuple[Any, Any]] = []  # of events that may not have come yet

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context manager: the device computes."""
        outer = self._begun is not None
        if not outer:
            self._begun = self._mark()
        try:
            yield
        finally:
            if not outer:
                self._end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager: the host prepares something meanwhile, such as kernels, which does not count."""
        begun = self._begun is not None
        if begun:
            self._end()
        try:
            yield
        finally:
            if begun:
                self._begun = self._mark()

    @property
    def seconds(self) -> float:
        """Seconds so far; waits for the device."""
        while self._intervals:
            first, last = self._intervals.pop()
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1e3
        return self._seconds

    def _mark(self) -> Any:
        if self._gpu is None:
            return self._now()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event

    def _end(self) -> None:
        first, last, self._begun = self._begun, self._mark(), None
        if self._gpu is None:
            self._seconds += last - first
            return
        self._intervals.append((first, last))
        if len(self._intervals) > _MOST_INTERVALS:
            for interval in [i for i in self._intervals if i[1].query()]:
                self._intervals.remove(interval)
                self._seconds += interval[0].elapsed_time(interval[1]) / 1e3


def _choose_kernels(torch_device: str, requested: str) -> tuple[str, str]:
    """Kernels that run on a device, and why."""
    from emt_kernels.selection import select

    try:
        if torch_device.startswith("cuda"):
            return select(requested)  # type: ignore[arg-type]
        if requested == "triton":
            raise RuntimeError(f"Triton's kernels need a CUDA GPU, the device is {torch_device}")
    except RuntimeError as error:
        raise EmtError(str(error), "Use --kernels auto, or run `emt doctor`.") from None
    return "reference", "requested" if requested == "reference" else f"the device is {torch_device}"


def _peak_memory() -> int:
    """Bytes of memory that this process has had at most; on systems that do not keep that, those that it has."""
    try:
        import resource
    except ImportError:
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _system_memory() -> int:
    import psutil

    return psutil.virtual_memory().total


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a computation failed for want of memory, on a GPU or on a CPU."""
    torch = sys.modules.get("torch")  # what has not been imported raises nothing
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ()))
    ):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in message or "can't allocate memory" in message)
