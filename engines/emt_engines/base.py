"""The interface of engine builders, and the error of an engine that this machine cannot run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from emt.errors import EmtError
from emt_engines.manifest import Part, Request

if TYPE_CHECKING:
    from emt.pipeline import MotionTransfer

Progress = Callable[[str, float], None]
"""Called with the current activity and the share of the build that is done, from 0 to 1."""


class Builder(Protocol):
    """Builder of the engines of one backend; `emt_engines.registry.BACKENDS` lists them.

    Attributes:
        name: Value of `--backend`.
        depends: Names of `Host.versions`; an engine runs only with the same versions of these.
        bound: Whether an engine runs only on the kind of device that it was built on.
        refits: Whether an engine takes the model's weights when it is loaded.
        opset: ONNX opset; None for backends without one.
    """

    name: str
    depends: tuple[str, ...]
    bound: bool
    refits: bool
    opset: int | None

    def check(self, request: Request) -> None:
        """Raise EmtError unless an engine for a request can be built here; called before anything is loaded.

        Raises:
            EmtError: a library or a compiler is missing, or the backend does not support the request.
        """
        ...

    def build(self, pipe: MotionTransfer, request: Request, folder: Path, progress: Progress) -> list[Part]:
        """Write the engine's files into `folder`.

        Args:
            pipe: The model on `request.device` in the dtype of `request.precision`, LoRAs merged.
            request: Shapes, precision and device.
            folder: An empty folder.
            progress: Called at each step of the build.

        Returns:
            The parts, without parity: `build_engine` opens the engine and measures it.

        Raises:
            EmtError: the engine cannot be built.
        """
        ...


class CannotRun(EmtError):
    """An engine cannot be run on this machine, and so cannot be compared with PyTorch here."""
