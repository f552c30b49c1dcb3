"""Manifest of an engine: what it was built from and for, and whether it may run here.

An engine is a folder of compiled files and `manifest.json`. It runs only where everything that it depends on is as it
was when it was built: weights, code, shapes, dtype, GPU and library versions. `Manifest.match` names what differs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from emt.errors import EmtError
from emt.storage import sha256_of
from emt_engines.decode import decode, loads
from emt_engines.fingerprint import Host, Weights, code_sha256
from emt_engines.registry import BACKENDS, builder_modules

FILE = "manifest.json"
FORMAT = 2
PRECISIONS = ("fp32", "fp16", "bf16")
PIXELS = 8
"""Width and height are multiples of this."""

#: Dimensions that vary of each part, by its name.
DIMENSIONS = {
    "denoise": {"samples", "frames", "width", "height"},
    "reference": {"frames", "width", "height"},
    "vae_encoder": {"images", "width", "height"},
    "vae_decoder": {"images", "width", "height"},
}

_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})(?:\.\.(\d{1,9})x(\d{1,9}))?")


@dataclass(frozen=True)
class Size:
    """A range of clip sizes in pixels, (width, height) from `least` to `most`, both inclusive; usually one size."""

    least: tuple[int, int]
    most: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `512x512` or `256x256..768x512`, width first.

        Raises:
            EmtError: it is neither, or a side is no multiple of 8.
        """
        match = _SIZE.fullmatch(text.strip())
        if not match:
            raise EmtError(f"--size has {text!r}", "Sizes are WIDTHxHEIGHT, as in 512x512 or 256x256..768x512.")
        numbers = [int(number) for number in match.groups() if number]
        least = (numbers[0], numbers[1])
        most = (numbers[2], numbers[3]) if len(numbers) > 2 else least
        for side in (*least, *most):
            if side % PIXELS or not PIXELS <= side <= 4096:
                raise EmtError(f"--size has {text!r}", f"Sides are multiples of {PIXELS} from {PIXELS} to 4096 pixels.")
        if least[0] > most[0] or least[1] > most[1]:
            raise EmtError(f"--size has {text!r}", "A range rises: MIN..MAX.")
        return cls(least, most)

    @property
    def exact(self) -> bool:
        """Return whether it is one size."""
        return self.least == self.most

    @property
    def typical(self) -> tuple[int, int]:
        """A size in the middle of the range."""
        width, height = ((a + b) // (2 * PIXELS) * PIXELS for a, b in zip(self.least, self.most))
        return width, height

    def contains(self, other: Size) -> bool:
        """Return whether all of another range is in this one."""
        return all(a <= b for a, b in zip(self.least, other.least)) and all(
            b <= a for a, b in zip(self.most, other.most)
        )

    def __str__(self) -> str:
        least, most = ("x".join(map(str, side)) for side in (self.least, self.most))
        return least if self.exact else f"{least}..{most}"


def range_text(numbers: tuple[int, int]) -> str:
    """A range as `--batch` takes it: `4` or `1..4`."""
    low, high = numbers
    return str(low) if low == high else f"{low}..{high}"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a part; `shape` has numbers, and names for the dimensions that vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One compiled function of an engine.

    Attributes:
        name: denoise, reference, vae_encoder or vae_decoder.
        file: Its file, relative to the engine's folder.
        sha256: Of the file.
        shapes: Least and greatest value of what varies: samples, images, frames, height, width (pixels).
        inputs: In the order in which it takes them.
        outputs: In the order in which it returns them.
        parity: Greatest difference from eager PyTorch over its greatest value; None: not verified.
        files: SHA-256 of other files that it needs, by name (external data).
        facts: Values that only the engine's backend reads.
    """

    name: str
    file: str
    sha256: str
    shapes: Mapping[str, tuple[int, int]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: float | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """Requirements on an engine: of a clip to make, or of a build.

    Attributes:
        backend: inductor, tensorrt, tensorrt-rtx or onnx; empty for any.
        precision: fp32, fp16 or bf16.
        device: Where it runs, as torch names it: `cuda:0`, `cpu`.
        sizes: Of clips; none: whichever the engine has.
        frames: Of a clip; 0: as many as the engine has.
        batch: Least and most clips at once; guidance doubles them. Any number fits (0, 0).
        weights: Hashes of the model's weights.
        model: What the user calls the model; for messages.
        loras: As the user named them; for messages.
        plugin: Whether TensorRT computes temporal integration with the kernel, as a plugin.
    """

    backend: str
    precision: str
    device: str
    sizes: tuple[Size, ...]
    frames: int
    batch: tuple[int, int]
    weights: Weights
    model: str = "MODEL"
    loras: tuple[str, ...] = ()
    plugin: bool = True

    @property
    def command(self) -> str:
        """The command that builds such an engine."""
        words = ["emt", "build-engine", "--model", self.model]
        words += ["--backend", self.backend or "inductor", "--size", ",".join(map(str, self.sizes))]
        words += ["--frames", str(self.frames), "--batch", range_text(self.batch)]
        words += ["--precision", self.precision]
        words += ["--device", self.device] if self.device != "cuda:0" else []
        words += [word for lora in self.loras for word in ("--lora", lora)]
        words += [] if self.plugin else ["--no-plugin"]
        return shlex.join(words)


@dataclass(frozen=True)
class Manifest:
    """The record of an engine.

    Attributes:
        backend: inductor, tensorrt, tensorrt-rtx or onnx.
        model: What the model was called.
        precision: fp32, fp16 or bf16.
        sizes: Of clips.
        frames: Of a clip.
        batch: Least and most clips at once; guidance doubles them.
        weights: Hashes of the weights that it was built from.
        refits: Whether it reads the model's weights when it is loaded; then any of the same shapes will do.
        code: `code_sha256` of the network and of the module that built it.
        host: The device and the libraries that it was built with; of the versions, those that it depends on.
        bound: Whether it runs only on the kind of device that it was built on.
        opset: Of ONNX; None without.
        parts: Its compiled functions.
        built: When, in ISO 8601.
        seconds: Duration of the build.
    """

    backend: str
    model: str
    precision: str
    sizes: tuple[Size, ...]
    frames: int
    batch: tuple[int, int]
    weights: Weights
    refits: bool
    code: str
    host: Host
    bound: bool
    opset: int | None
    parts: tuple[Part, ...]
    built: str
    seconds: float

    @property
    def id(self) -> str:
        """A hash over the whole manifest, 32 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    @property
    def parity(self) -> float | None:
        """The largest parity error of its parts; None if one was not verified."""
        found = [part.parity for part in self.parts]
        return None if None in found or not found else max(p for p in found if p is not None)

    # ---------------------------------------------------------------------------------------------------- may it run

    def match(self, request: Request, host: Host | None = None, code: str | None = None) -> tuple[bool, str]:
        """Return whether it may run for a request, and if not, the reason.

        Args:
            request: The requirements.
            host: Device and libraries to run with; None for this machine's.
            code: `code_sha256` there; None for this program's.
        """
        host = host or Host.here(request.device)
        code = code or code_sha256(*builder_modules(self.backend))
        for reason in (
            self._other_kind(request),
            self._other_weights(request.weights),
            "the code of the network has changed since it was built" if code != self.code else "",
            self._other_host(host),
            self._other_shapes(request),
        ):
            if reason:
                return False, reason
        return True, ""

    def covers(self, width: int, height: int, frames: int) -> bool:
        """Return whether it takes clips of a size and length."""
        size = Size((width, height), (width, height))
        return frames == self.frames and any(own.contains(size) for own in self.sizes)

    def _other_kind(self, request: Request) -> str:
        if request.backend and request.backend != self.backend:
            return f"it is of the backend {self.backend}, not {request.backend}"
        if request.precision != self.precision:
            return f"it computes in {self.precision}, not {request.precision}"
        return ""

    def _other_weights(self, weights: Weights) -> str:
        names = {"unet": "network", "adapter": "adapter", "vae": "VAE"}
        if weights.parts.get("config") != self.weights.parts.get("config"):
            return "it was built for networks of other sizes than the model's"
        if self.refits:
            return ""
        for part, sha256 in self.weights.parts.items():
            if weights.parts.get(part) != sha256:
                return f"it was built from another {names.get(part, part)} than the model's"
        if self.weights.loras != weights.loras:
            own, other = ([f"{sha256[:8]}…:{scale:g}" for sha256, scale in w.loras] for w in (self.weights, weights))
            return f"it was built with the LoRAs {own or 'none'}, not {other or 'none'}"
        return ""

    def _other_host(self, host: Host) -> str:
        if self.bound and host.device != self.host.device:
            return f"it was built for {self.host.device}, here is {host.device}"
        if self.bound and host.capability != self.host.capability:
            return f"it was built for the compute capability {self.host.capability}, here is {host.capability}"
        missing = set(self.host.instructions) - set(host.instructions) if self.bound else set()
        if missing:
            return f"it was built for a processor with {', '.join(sorted(missing))}, which this one lacks"
        for name, version in self.host.versions.items():
            if host.versions.get(name) != version:
                return f"it was built with {name} {version}, here is {host.versions.get(name, 'none')}"
        return ""

    def _other_shapes(self, request: Request) -> str:
        if request.frames not in (0, self.frames):
            return f"it makes clips of {self.frames} frames, not {request.frames}"
        for size in request.sizes:
            if not any(own.contains(size) for own in self.sizes):
                return f"it makes clips of {', '.join(map(str, self.sizes))} pixels, not {size}"
        if request.batch != (0, 0) and (request.batch[0] < self.batch[0] or request.batch[1] > self.batch[1]):
            own, other = range_text(self.batch), range_text(request.batch)
            return f"it makes {own} clip{'s' * (self.batch[1] > 1)} at once, not {other}"
        return ""

    # ------------------------------------------------------------------------------------------------------ on disk

    def as_bytes(self) -> bytes:
        """The content of `manifest.json`, with a hash of itself, by which damage is found."""
        body = asdict(self)
        return json.dumps({"format": FORMAT, "id": self.id, **body}, indent=1).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of an engine's folder.

        Raises:
            EmtError: there is none, or it is damaged or of another version.
        """
        path = folder / FILE
        hint = "Build the engine again with emt build-engine, or name another folder."
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise EmtError(f"{folder} is no engine: {FILE} is not a file", hint)
            body = loads(path.read_bytes())
        except OSError as error:
            raise EmtError(f"{folder} is no engine: {FILE}: {error.strerror}", hint) from None
        except ValueError as error:
            raise EmtError(f"{path} is damaged: it is not JSON ({error})", hint) from None
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise EmtError(f"{path} is of another version of emt", hint)
        stored = body.pop("id", None)
        try:
            manifest = decode(cls, body)
            manifest._check_values()
        except ValueError as error:
            raise EmtError(f"{path} is damaged: {error}", hint) from None
        if manifest.id != stored:
            raise EmtError(f"{path} is damaged or was changed: its content does not have its hash", hint)
        return manifest

    def _check_values(self) -> None:
        """Raise ValueError if a value is of the right type, and yet none that a build writes."""
        if self.backend not in BACKENDS or self.precision not in PRECISIONS:
            raise ValueError(f"it is of the backend {self.backend!r} in {self.precision!r}")
        if datetime.fromisoformat(self.built).tzinfo is None:
            raise ValueError(f"built is {self.built!r}, without a time zone")
        if not 1 <= self.batch[0] <= self.batch[1] or self.frames < 1:
            raise ValueError(f"batch is {self.batch}, frames is {self.frames}")
        for size in self.sizes:
            try:
                Size.parse(str(size))
            except EmtError as error:
                raise ValueError(error.problem) from None
        for part in self.parts:
            if DIMENSIONS.get(part.name) != part.shapes.keys():
                raise ValueError(f"the part {part.name!r} varies in {sorted(part.shapes)}")
            if any(not 1 <= least <= most for least, most in part.shapes.values()):
                raise ValueError(f"the part {part.name!r} varies in {dict(part.shapes)}")
            if not part.outputs:
                raise ValueError(f"the part {part.name!r} has no outputs")

    def check_files(self, folder: Path) -> None:
        """Check that every file of the engine is there with the content that was built.

        Raises:
            EmtError: naming the first that is not.
        """
        hint = "Build the engine again with emt build-engine."
        for part in self.parts:
            for name, sha256 in {part.file: part.sha256, **part.files}.items():
                path = folder / name
                if Path(name).name != name:
                    raise EmtError(f"{folder / FILE} names the file {name!r}, which is not in its folder", hint)
                try:
                    found = sha256_of(path)
                except OSError as error:
                    raise EmtError(f"the engine's file {path} cannot be read: {error.strerror}", hint) from None
                if found != sha256:
                    raise EmtError(f"the engine's file {path} is damaged or was changed: its SHA-256 differs", hint)

    def files(self) -> Sequence[str]:
        """Names of all of its files, without the manifest."""
        return [name for part in self.parts for name in (part.file, *part.files)]
