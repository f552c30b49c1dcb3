"""Choice of the engine for a clip: the one that `--engine` names, a matching one of the cache, or PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emt.cache import ContentIndex, default_dir
from emt.errors import EmtError
from emt.model_folder import Model
from emt.remote import check_on_disk
from emt_engines.fingerprint import Weights, weights_of
from emt_engines.manifest import FILE, Manifest, Request, Size

if TYPE_CHECKING:
    from emt.device import Device

AUTO, TORCH = "auto", "torch"


@dataclass(frozen=True)
class Engine:
    """An engine on disk."""

    folder: Path
    manifest: Manifest


def engines_dir(cache: Path | None = None) -> Path:
    """The folder of engines in a cache folder; None: in the user's.

    Raises:
        EmtError: the cache folder is a URL.
    """
    check_on_disk(cache, "--cache-dir")
    return (cache or default_dir()) / "engines"


def list_engines(folder: Path) -> tuple[list[Engine], list[tuple[Path, EmtError]]]:
    """The engines in a folder of engines, the newest first, and those that are damaged.

    Raises:
        EmtError: the folder may not be read.
    """
    engines, damaged = [], []
    try:
        found = sorted(folder.glob(f"[!.]*/{FILE}"))  # hidden ones are being written
    except OSError as error:
        problem = f"engines in {folder} cannot be looked for: {error.strerror}"
        raise EmtError(problem, "Name another cache with --cache-dir, or set XDG_CACHE_HOME.") from None
    for path in found:
        try:
            engines.append(Engine(path.parent, Manifest.read(path.parent)))
        except EmtError as error:
            damaged.append((path.parent, error))
    return sorted(engines, key=lambda engine: engine.manifest.built, reverse=True), damaged


def model_weights(model: Model, index: ContentIndex, loras: Sequence[tuple[Path, float]] = ()) -> Weights:
    """Hashes of a model's weights, memoized in `index`."""

    def remember(fact: str, path: Path, find: Callable[[], Any]) -> Any:
        return index.remember(fact, path, path.stat(), find)

    return weights_of(model.folder, loras, remember)


def engine_id(requested: str) -> str:
    """The value of `--engine` as part of a job's identity: independent of where the engine's folder is.

    Raises:
        EmtError: it is no engine.
    """
    return requested if requested in (AUTO, TORCH) else Manifest.read(Path(requested)).id


class EngineChoice:
    """Chooses the engine for clips of a shape, once for each. Threads may share it.

    Args:
        requested: auto, torch, or the folder of an engine.
        model: The model that makes the clips.
        index: Content hashes.
        folder: The folder of engines that auto searches; None: the user's.
        say: Called with a line on what auto chose and why.

    Raises:
        EmtError: `requested` is no engine.
    """

    def __init__(
        self,
        requested: str,
        model: Model,
        index: ContentIndex,
        folder: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.index, self.say = model, index, say
        self.folder = folder or engines_dir()
        self.requested = requested
        self.named = None if requested in (AUTO, TORCH) else Engine(Path(requested), Manifest.read(Path(requested)))
        self._guard = threading.Lock()
        self._passed: set[str] = set()
        self._chosen: dict[tuple[int, int, int, bool], Engine | None] = {}
        self._fitting: list[Engine] | None = None

    @property
    def frames(self) -> int | None:
        """Frames of the named engine's clips, which are its windows of longer ones; None if there is none."""
        return self.named.manifest.frames if self.named else None

    def check(self, width: int, height: int, frames: int, cache_interval: int, *, changed: bool = False) -> None:
        """Raise EmtError unless the named engine, if there is one, makes clips of this shape; needs no torch.

        Args:
            width: Pixels.
            height: Pixels.
            frames: Of a clip.
            cache_interval: Steps between computations of the deep levels.
            changed: With other weights than the model's, of a LoRA or a VAE.

        Raises:
            EmtError: it does not; the hint has the command that builds one that does.
        """
        if not self.named:
            return
        if changed and not self.named.manifest.refits:
            raise EmtError(
                f"the engine {self.named.folder} has the model's weights built in, and takes no --lora and no --vae",
                "Use --engine torch, or an engine of the backend inductor.",
            )
        if cache_interval > 1:
            raise EmtError(
                f"the engine {self.named.folder} computes the whole network in every step, cache_interval is "
                f"{cache_interval}",
                "Use --cache-interval 1, or --engine torch.",
            )
        own = self.named.manifest
        if not own.covers(width, height, frames):
            sizes = ", ".join(map(str, own.sizes))
            wanted = Size((width, height), (width, height))
            request = self._request(own.precision, "", own, (*own.sizes, wanted), frames)
            raise EmtError(
                f"the engine {self.named.folder} makes clips of {own.frames} frames of {sizes} pixels, not "
                f"{frames} frames of {wanted}",
                f"Build one with: {request.command}",
            )

    def check_text(self, is_long: bool) -> None:
        """Raise EmtError if there is a named engine and the encoding of the prompts is longer than its one text.

        Raises:
            EmtError: it is.
        """
        if is_long and self.named:
            raise EmtError(
                f"the engine {self.named.folder} reads one text of the text encoder, not longer prompts nor ones that "
                "change over the clip",
                "Use --engine torch, or --prompt-syntax plain.",
            )

    def applies(self, cache_interval: int, has_long_text: bool = False) -> bool:
        """Return whether an engine may make a clip; reports, once for each, what rules out those that there are."""
        if (cache_interval == 1 and not has_long_text) or self.requested == TORCH:
            return True
        if not self.named and not self._has_engines():
            return False
        reason = "engines do not reuse deep features (--cache-interval)"
        if cache_interval == 1:
            reason = "engines read one text of the text encoder, not longer prompts nor ones that change over the clip"
        with self._guard:
            if reason not in self._passed:
                self.say(f"engine: torch, since {reason}")
            self._passed.add(reason)
        return False

    def check_match(self, device: Device) -> None:
        """Raise EmtError unless the named engine, if there is one, may run on a device.

        Raises:
            EmtError: it may not; says why, and what to build.
        """
        if self.named:
            with self._guard:
                self._fitting = self._fitting or self._fits(device)

    def find(self, device: Device, width: int, height: int, frames: int, *, changed: bool = False) -> Engine | None:
        """The engine for clips of a shape; None for PyTorch. `changed` is as for `check`.

        Raises:
            EmtError: the engine that the user named may not run here; says why, and what to build.
        """
        with self._guard:
            shape = (width, height, frames, changed)
            if shape not in self._chosen:
                self._chosen[shape] = self._choose(device, *shape)
            return self._chosen[shape]

    def _choose(self, device: Device, width: int, height: int, frames: int, changed: bool) -> Engine | None:
        if self.requested == TORCH:
            return None
        if self._fitting is None:
            self._fitting = self._fits(device)
        fitting = [engine for engine in self._fitting if engine.manifest.covers(width, height, frames)]
        if changed and fitting and not (fitting := [engine for engine in fitting if engine.manifest.refits]):
            self.say("engine: torch for clips with --lora or --vae, since the engines here have their weights built in")
            return None
        if self.requested != AUTO:
            return fitting[0] if fitting else None
        if fitting:
            engine = fitting[0]
            self.say(f"engine: {engine.manifest.backend}, {engine.folder} (it matches the model and {device.name})")
        elif self._fitting:
            self.say(f"engine: torch for {frames} frames of {width}x{height}, which no engine here has")
        return fitting[0] if fitting else None

    def _has_engines(self) -> bool:
        """Return whether the cache has any."""
        try:
            return bool(list_engines(self.folder)[0])
        except EmtError:
            return False

    def _fits(self, device: Device) -> list[Engine]:
        """The named engine, or the engines of the cache that may run."""
        try:
            candidates = [self.named] if self.named else list_engines(self.folder)[0]
        except EmtError as error:
            self.say(f"engine: torch, since {error.problem}")
            return []
        if not candidates:
            return []
        fitting, reasons = [], []
        for engine in candidates:
            own = engine.manifest
            request = self._request(device.precision, device.torch_device, None, (), 0)
            ok, reason = own.match(request)
            if ok and not self.named:
                reason = _unfit_for_auto(own)
                ok = not reason
            if ok:
                fitting.append(engine)
                continue
            reasons.append(f"{engine.folder.name}: {reason}")
            if self.named:
                right = self._request(device.precision, device.torch_device, own, own.sizes, own.frames)
                raise EmtError(
                    f"the engine {engine.folder} does not match: {reason}", f"Build the right one with: {right.command}"
                )
        if not fitting:
            self.say(f"engine: torch, since no engine matches ({'; '.join(reasons[:3])})")
        return fitting

    def _request(
        self, precision: str, device: str, like: Manifest | None, sizes: tuple[Size, ...], frames: int
    ) -> Request:
        return Request(
            backend=like.backend if like else "",
            precision=precision,
            device=device or "cuda:0",
            sizes=sizes,
            frames=frames,
            batch=like.batch if like else (0, 0),
            weights=model_weights(self.model, self.index),
            model=self.model.name,
        )


def _unfit_for_auto(manifest: Manifest) -> str:
    """Reason why auto does not use an engine that could run; empty if it does."""
    if manifest.backend == "onnx":
        return "it is for other programs to run"
    if manifest.parity is None:
        return "it has not been compared with PyTorch (emt engines verify)"
    return ""
