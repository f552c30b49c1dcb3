"""The two libraries that build and run TensorRT engines: what each is called, needs and runs on. Imports no torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from emt.errors import EmtError


@dataclass(frozen=True)
class Product:
    """One of the two libraries.

    Attributes:
        backend: As `--backend` has it.
        module: Of Python.
        install: What to type if it is not there.
        targets: Compute capabilities that an engine is built for, by the library's names; empty: the GPU that is there.
        runs: Compute capabilities that run its engines, in words.
    """

    backend: str
    module: str
    install: str
    targets: tuple[str, ...] = ()
    runs: str = ""

    def load(self) -> Any:
        """The library's module.

        Raises:
            EmtError: it is not installed, or cannot be loaded.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            raise EmtError(f"{self.module} cannot be loaded: {error}", self.install) from None

    def refuses(self, capability: tuple[int, int]) -> bool:
        """Return whether GPUs of a compute capability cannot run its engines."""
        name = "".join(map(str, capability))
        return bool(self.targets) and f"SM{name}" not in self.targets and capability[0] != 12


TENSORRT = Product("tensorrt", "tensorrt", "Install TensorRT 10.10 or newer: pip install tensorrt")
RTX = Product(
    "tensorrt-rtx",
    "tensorrt_rtx",
    "Install TensorRT for RTX: pip install 'emt-cli[rtx]'",
    targets=("SM80", "SM86", "SM89", "SM120"),
    runs="8.0, 8.6, 8.9 and 12.x",
)
