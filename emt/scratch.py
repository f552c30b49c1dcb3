"""Room for arrays that may be larger than the memory: small ones are in it, large ones in a file without a name.

The system writes what is not used to disk and reads it when it is, so that the memory of a process that goes through a
large array from one end to the other does not grow with it. The file is in `TMPDIR`, and gone with the array.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from emt.errors import EmtError

if TYPE_CHECKING:
    import torch

IN_MEMORY = 64 << 20
"""Bytes up to which an array is in memory."""

_ALIGNED = 64  # bytes to a multiple of which a tensor begins


def scratch_array(shape: Sequence[int], dtype: type = np.uint8) -> np.ndarray:
    """An array of arbitrary content.

    Raises:
        EmtError: it is large, and the disk of `TMPDIR` has no room for it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype)
    return np.frombuffer(_file_of(size), dtype).reshape(shape)


def scratch_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of arbitrary content, in the computer's memory or on its disk.

    Raises:
        EmtError: as `scratch_array`.
    """
    return scratch_tensors([shape], dtype)[0]


def scratch_tensors(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of arbitrary content, all in the computer's memory or, if they are large together, all on its disk.

    Raises:
        EmtError: as `scratch_array`.
    """
    import torch

    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    starts = [0, *itertools.accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
    room = torch.from_numpy(scratch_array([starts[-1]]))
    parts = (room[start : start + size] for start, size in zip(starts, sizes))
    return [part.view(dtype).view(*shape) for part, shape in zip(parts, shapes)]


def _file_of(size: int) -> mmap.mmap:
    """A file of so many bytes, mapped; all of them are on disk, as a full one is found here and not at some access."""
    with tempfile.TemporaryFile(prefix="emt-") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
        except OSError as error:
            problem = f"no room for {size / 2**30:.1f} GiB in {tempfile.gettempdir()}: {error.strerror}"
            raise EmtError(problem, "Name a folder on a larger disk by the environment variable TMPDIR.") from None
