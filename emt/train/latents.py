"""Latents of training clips on disk: encoded once in a run, however often a clip is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from emt.errors import EmtError
from emt.storage import write_atomically


class LatentCache:
    """Files of latents, by the frames that they are of: in float32 8 MiB for 81 frames of 480×832 of Wan's autoencoder.

    Args:
        folder: to keep them in.
        vae: folder of the autoencoder: latents of another one are not taken.
    """

    def __init__(self, folder: Path, vae: Path) -> None:
        self.folder = folder
        files = sorted(path for path in vae.iterdir() if path.is_file())
        self._vae = b"".join(_digest(path.name.encode(), path.read_bytes()) for path in files)

    def get(self, frames: NDArray[np.uint8], encode: Callable[[], Tensor]) -> Tensor:
        """Latents of a clip; on the CPU if they were known.

        Args:
            frames: RGB, (frames, height, width, 3).
            encode: makes them where they are not known; they are the same every time.

        Raises:
            EmtError: they cannot be kept.
        """
        shape = str((frames.shape, frames.dtype)).encode()
        path = self.folder / f"{_digest(self._vae, shape, np.ascontiguousarray(frames).data).hex()}.safetensors"
        try:
            return load_file(path)["latents"]
        except (OSError, SafetensorError, KeyError):  # not there, or damaged
            latents = encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({"latents": latents.cpu().contiguous()}))
        except OSError as error:
            hint = "Free some space and go on with: emt train … --resume latest"
            raise EmtError(f"the latents {path} cannot be written: {error}", hint) from error
        return latents


def _digest(*parts: bytes | memoryview) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.digest()
