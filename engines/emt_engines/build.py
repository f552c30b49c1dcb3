"""Builds engines: folders that appear complete or not at all, verified against eager PyTorch."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from emt.errors import EmtError
from emt.storage import new_folder, remove_partials, write_atomically
from emt_engines.base import CannotRun, Progress
from emt_engines.fingerprint import Host, code_sha256
from emt_engines.manifest import FILE, Manifest, Part, Request
from emt_engines.registry import builder_modules, load_builder, load_runtime

if TYPE_CHECKING:
    from emt.backends.base import Backend
    from emt.pipeline import MotionTransfer

#: Greatest difference from eager PyTorch, over the greatest value, that a build may have. In fp16 a network of this
#: depth rounds to about 5e-3; bf16 has an eighth of its precision, and accumulation loses less than that suggests.
PARITY = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}


def open_engine(folder: Path, manifest: Manifest, pipe: MotionTransfer) -> Backend:
    """The backend that runs an engine, after checking its files; the caller has checked `Manifest.match`.

    Raises:
        EmtError: a file is missing, damaged or changed.
        CannotRun: this machine cannot run engines of this backend.
    """
    manifest.check_files(folder)
    runtime: Backend = load_runtime(manifest.backend)(folder, manifest, pipe)
    return runtime


def build_engine(
    pipe: MotionTransfer, request: Request, folder: Path, progress: Progress = lambda what, done: None
) -> Manifest:
    """Build an engine into a folder, which appears under its name only when complete and verified.

    An engine that is there already is replaced; whatever ends the build early leaves it as it was.

    Args:
        pipe: The model on `request.device` in the dtype of `request.precision`, LoRAs merged.
        request: Shapes, precision and device.
        folder: Where to; must not exist, be empty, or be an engine.
        progress: Called at each step of the build.

    Raises:
        EmtError: it cannot be built here, its folder is in use, or it differs too much from eager PyTorch.
    """
    begun = time.monotonic()
    builder = load_builder(request.backend)()
    builder.check(request)
    folder = folder.absolute()
    check_target(folder)
    code = code_sha256(*builder_modules(builder.name))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(folder.parent)
        with new_folder(folder) as partial:
            parts = builder.build(pipe, request, partial, lambda what, done: progress(what, 0.9 * done))
            host = Host.here(request.device)
            versions = {name: v for name, v in host.versions.items() if name in builder.depends}
            manifest = Manifest(
                backend=builder.name,
                model=request.model,
                precision=request.precision,
                sizes=request.sizes,
                frames=request.frames,
                batch=request.batch,
                weights=request.weights,
                refits=builder.refits,
                code=code,
                host=replace(host, versions=versions),
                bound=builder.bound,
                opset=builder.opset,
                parts=tuple(parts),
                built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                seconds=0.0,
            )
            progress("comparing with eager PyTorch", 0.9)
            with contextlib.suppress(CannotRun):  # `emt engines verify` compares it where it runs
                manifest = replace(manifest, parts=verified(partial, manifest, pipe))
            manifest = replace(manifest, seconds=round(time.monotonic() - begun, 1))
            write_atomically(partial / FILE, manifest.as_bytes())
    except OSError as error:
        raise EmtError(
            f"the engine cannot be written: {error.strerror or error}", f"Its folder was to be {folder}."
        ) from error
    progress("done", 1.0)
    return manifest


def verified(folder: Path, manifest: Manifest, pipe: MotionTransfer) -> tuple[Part, ...]:
    """Measure the parity of an engine; returns its parts with it.

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
                "It is not kept. Try another --precision, and report it to the authors.",
            )
    return tuple(replace(part, parity=found.get(part.name)) for part in manifest.parts)


def check_target(folder: Path) -> None:
    """Raise EmtError if a folder holds something else than an engine."""
    if folder.exists() and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise EmtError(f"{folder} exists and is no engine", "Name another folder with --output.")
