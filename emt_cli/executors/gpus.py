"""The GPUs of this machine, as `--gpus` names them; needs no torch."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from emt.errors import EmtError
from emt_cli.batch.options import parse_gpus

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """GPUs that CUDA programs see here, in their order: by CUDA_VISIBLE_DEVICES where it is set, else by number."""
    if (given := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in given.split(",") if name.strip() and name.strip() != "-1"]
    return [str(number) for number in range(count_gpus(management_library()))]


def management_library() -> Any:
    """The library of NVIDIA's driver that knows its GPUs without starting them; None where there is none."""
    try:
        return ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None


def count_gpus(library: Any) -> int:
    """Number of NVIDIA GPUs, as PyTorch counts them; `nvidia-smi` would take seconds to start each of them.

    Args:
        library: From `management_library`.
    """
    count = ctypes.c_uint()
    if library is None or library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return 0
    return count.value


def choose_gpus(text: str) -> list[str]:
    """The GPUs of `--gpus`, as CUDA_VISIBLE_DEVICES names them.

    Args:
        text: all, how many, or a list of numbers, counted as PyTorch counts them.

    Raises:
        EmtError: there are not so many.
    """
    found = visible_gpus()
    wanted = parse_gpus(text)
    if not found:
        raise EmtError(
            "--gpus finds no NVIDIA GPU on this machine", "Use --device cpu --workers N, or run `emt doctor`."
        )
    if wanted is None:
        return found
    numbers = range(wanted) if isinstance(wanted, int) else wanted
    if max(numbers) >= len(found):
        there = f"this machine has {len(found)}" + ("" if len(found) == 1 else f", 0 to {len(found) - 1}")
        raise EmtError(f"--gpus is {text!r}, {there}", "Use --gpus all, or --ray for those of other machines.")
    return [found[number] for number in numbers]
