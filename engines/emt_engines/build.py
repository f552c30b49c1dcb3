"""Builds engines: a folder that is there whole or not at all, and whose numbers have been compared with PyTorch's."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from emt.errors import EmtError
from emt.storage import partial_beside, sync_tree, write_atomically
from emt_engines.manifest import FILE, Manifest, Part, Place, Request, code_sha256

if TYPE_CHECKING:
    from emt.backends.torch import Backend
    from emt.pipeline import MotionTransferPipeline

Progress = Callable[[str, float], None]
"""Is told what is being done and how much of all is done, from 0 to 1."""


class Builder(Protocol):
    """Makes the files of engines of one backend; see `BUILDERS`.

    Attributes:
        name: As `--backend` has it.
        depends: Names of `Place.versions` with which a built engine runs only if they are the same.
        bound: Whether an engine runs on the device that it was built on alone.
        refits: Whether an engine takes the model's weights when it is loaded.
        opset: Of ONNX; None without.
    """

    name: str
    depends: tuple[str, ...]
    bound: bool
    refits: bool
    opset: int | None

    def check(self, request: Request) -> None:
        """Say whether an engine for a request can be built here, before anything is loaded.

        Raises:
            EmtError: it cannot: a library or a compiler is missing, or the backend cannot do what is asked.
        """
        ...

    def build(self, pipe: MotionTransferPipeline, request: Request, folder: Path, progress: Progress) -> list[Part]:
        """Write the engine's files into `folder`.

        Args:
            pipe: The model on `request.device` in the type of `request.precision`, LoRAs merged.
            request: What to build.
            folder: An empty folder.
            progress: To be told now and then.

        Returns:
            The parts, without parity: `build_engine` opens the engine and measures it.

        Raises:
            EmtError: it cannot be built, in words.
        """
        ...


class CannotRun(EmtError):
    """An engine was built, but cannot be run on this machine, and so not be compared either."""


#: By backend: the module, the builder in it, and the class that runs what it builds:
#: `Class(folder: Path, manifest: Manifest, pipe: MotionTransferPipeline)`, an `emt.backends.torch.Backend`, which
#: raises `CannotRun` where this machine cannot run such engines.
BACKENDS = {
    "inductor": ("emt_engines.inductor", "InductorBuilder", "InductorBackend"),
    "onnx": ("emt_engines.onnx_export", "OnnxBuilder", "OnnxBackend"),
    "tensorrt": ("emt_engines.tensorrt", "TensorRTBuilder", "TensorRTBackend"),
    "tensorrt-rtx": ("emt_engines.tensorrt", "TensorRTRTXBuilder", "TensorRTRTXBackend"),
}

#: Greatest difference from eager PyTorch, over the greatest value, that a build may have. In fp16 a network of this
#: depth rounds to about 5e-3; bf16 has an eighth of its digits and sums that lose fewer than that suggests.
PARITY = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}


def _load(backend: str, place: int) -> Any:
    if backend not in BACKENDS:
        raise EmtError(f"there is no backend {backend!r}", f"Allowed are {', '.join(BACKENDS)}.")
    return getattr(importlib.import_module(BACKENDS[backend][0]), BACKENDS[backend][place])


def builder(backend: str) -> Builder:
    """The builder of a backend.

    Raises:
        EmtError: there is no such backend.
    """
    return _load(backend, 1)()


def builder_modules(backend: str) -> tuple[str, ...]:
    """The modules that build engines of a backend, whose code is part of what a manifest has a hash of."""
    module = BACKENDS[backend][0]
    # Engines of TensorRT begin as the file of the exporter, and may embed the plugin.
    return (module, "emt_engines.onnx_export", "emt_engines.plugin") if "tensorrt" in backend else (module,)


def open_engine(folder: Path, manifest: Manifest, pipe: MotionTransferPipeline) -> Backend:
    """What runs an engine, once its files have been checked; whether it matches is for the caller to ask first.

    Raises:
        EmtError: a file is missing, damaged or changed.
        CannotRun: this machine cannot run engines of this backend.
    """
    manifest.check_files(folder)
    return _load(manifest.backend, 2)(folder, manifest, pipe)


def build_engine(
    pipe: MotionTransferPipeline, request: Request, folder: Path, progress: Progress = lambda what, done: None
) -> Manifest:
    """Build an engine into a folder, which appears under its name only once it is complete and verified.

    An engine that is there already is replaced; whatever ends the build early leaves it as it was.

    Args:
        pipe: The model on `request.device` in the type of `request.precision`, LoRAs merged.
        request: What to build.
        folder: Where to; must not exist, be empty, or be an engine.
        progress: Is told how it goes.

    Raises:
        EmtError: it cannot be built here, its folder is in use, or it differs too much from eager PyTorch.
    """
    begun = time.monotonic()
    maker = builder(request.backend)
    maker.check(request)
    folder = folder.absolute()
    check_target(folder)
    partial = partial_beside(folder)
    code = code_sha256(*builder_modules(maker.name))
    try:
        partial.mkdir(parents=True)
        parts = maker.build(pipe, request, partial, lambda what, done: progress(what, 0.9 * done))
        place = Place.here(request.device)
        versions = {name: v for name, v in place.versions.items() if name in maker.depends}
        manifest = Manifest(
            backend=maker.name,
            model=request.model,
            precision=request.precision,
            sizes=request.sizes,
            frames=request.frames,
            batch=request.batch,
            weights=request.weights,
            refits=maker.refits,
            code=code,
            place=replace(place, versions=versions),
            bound=maker.bound,
            opset=maker.opset,
            parts=tuple(parts),
            built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=0.0,
        )
        progress("comparing with eager PyTorch", 0.9)
        with contextlib.suppress(CannotRun):  # `emt engines verify` compares it where it runs
            manifest = replace(manifest, parts=verified(partial, manifest, pipe))
        manifest = replace(manifest, seconds=round(time.monotonic() - begun, 1))
        write_atomically(partial / FILE, manifest.as_bytes())
        sync_tree(partial)
        _put(partial, folder)
    except OSError as error:
        raise EmtError(
            f"the engine cannot be written: {error.strerror or error}", f"Its folder was to be {folder}."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress("done", 1.0)
    return manifest


def verified(folder: Path, manifest: Manifest, pipe: MotionTransferPipeline) -> tuple[Part, ...]:
    """The parts of an engine with their parity, measured now.

    Raises:
        CannotRun: this machine cannot run it.
        EmtError: it differs from eager PyTorch by more than `PARITY` allows; names the part.
    """
    from emt_engines.parity import measure

    found = measure(open_engine(folder, manifest, pipe), manifest, pipe)
    limit = PARITY[manifest.precision]
    for name, parity in found.items():
        if not parity <= limit:  # NaN is too much as well
            raise EmtError(
                f"the engine's {name} differs from eager PyTorch by {parity:.1e}, more than {limit:.0e} of its "
                f"greatest value ({manifest.precision})",
                "It is not kept. Try another --precision, and tell the authors.",
            )
    return tuple(replace(part, parity=found.get(part.name)) for part in manifest.parts)


def check_target(folder: Path) -> None:
    """See that an engine may be put into a folder.

    Raises:
        EmtError: it holds something else.
    """
    if folder.exists() and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise EmtError(f"{folder} exists and is no engine", "Name another folder with --output.")


def _put(partial: Path, folder: Path) -> None:
    old = partial_beside(folder)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
