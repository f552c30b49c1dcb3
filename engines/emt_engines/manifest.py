"""What an engine is made from and for: the record that lies beside its files, and that decides whether it may run.

An engine is a folder of compiled files and `manifest.json`. It runs only where everything that it depends on is as it
was when it was built: weights, code, shapes, type, GPU and library versions. `Manifest.match` says what is not.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emt import __version__
from emt.errors import EmtError
from emt.storage import sha256_of

FILE = "manifest.json"
FORMAT = 1
PIXELS = 8
"""Width and height are multiples of this."""

_SIZE = re.compile(r"(\d+)x(\d+)(?:\.\.(\d+)x(\d+))?")
#: Names of processor features that compilers make use of, among those that the system lists.
_INSTRUCTIONS = re.compile(r"avx\w*|sse\w*|ssse3|amx\w*|fma|f16c|bmi\d|asimd\w*|neon|sve\w*|bf16|i8mm")


@dataclass(frozen=True)
class Size:
    """A range of clip sizes in pixels, (width, height) from `least` to `most`; usually one size, and both the same."""

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
        """Whether it is one size."""
        return self.least == self.most

    @property
    def typical(self) -> tuple[int, int]:
        """A size in the middle of the range."""
        width, height = ((a + b) // (2 * PIXELS) * PIXELS for a, b in zip(self.least, self.most))
        return width, height

    def contains(self, other: Size) -> bool:
        """Whether all of another range is in this one."""
        return all(a <= b for a, b in zip(self.least, other.least)) and all(
            b <= a for a, b in zip(self.most, other.most)
        )

    def __str__(self) -> str:
        least, most = ("x".join(map(str, side)) for side in (self.least, self.most))
        return least if self.exact else f"{least}..{most}"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that goes into or comes out of a part: `shape` has numbers, and names of the dimensions that vary."""

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
        facts: What else the backend that loads it wants to know.
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
class Weights:
    """What an engine's numbers come from, as SHA-256 of contents.

    Attributes:
        parts: Of `unet` (without the adapter), `adapter`, `vae`, and `config`, the sizes of the networks.
        loras: Of each LoRA merged into them, with its scale, in order.
    """

    parts: Mapping[str, str]
    loras: tuple[tuple[str, float], ...] = ()


#: Finds a fact that follows from a file's content, or remembers it: (name of the fact, file, how to find it).
Remember = Callable[[str, Path, Callable[[], Any]], Any]


def weights_of(
    folder: Path, loras: Sequence[tuple[Path, float]] = (), remember: Remember = lambda fact, path, find: find()
) -> Weights:
    """The hashes of a model folder's weights.

    Args:
        folder: The model.
        loras: Files to merge into them, and their scales.
        remember: Keeps the hashes of files that have not changed.

    Raises:
        EmtError: a file is missing or damaged.
    """
    try:
        unet, adapter = _gathered(
            remember("engine-weights", file, lambda file=file: _tensor_digests(file))  # type: ignore[misc]
            for file in sorted((folder / "unet").glob("*.safetensors"))
        )
        (vae,) = _gathered(
            [remember("sha256", file, lambda file=file: sha256_of(file))]  # type: ignore[misc]
            for file in sorted((folder / "vae").glob("*.safetensors"))
        )
        sizes = [json.loads((folder / part / "config.json").read_bytes()) for part in ("unet", "vae")]
        own = [{name: value for name, value in c.items() if not name.startswith("_")} for c in sizes]
        config = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        merged = tuple((remember("sha256", f, lambda f=f: sha256_of(f)), scale) for f, scale in loras)  # type: ignore[misc]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise EmtError(f"the weights of {folder} cannot be read: {error}", "Make the model folder again.") from None
    return Weights({"unet": unet, "adapter": adapter, "vae": vae, "config": config}, merged)


def _gathered(files: Iterable[Sequence[str]]) -> list[str]:
    """One hash for each column of hashes, a row a file."""
    return [hashlib.sha256(json.dumps(column).encode()).hexdigest() for column in zip(*files)]


def _tensor_digests(file: Path) -> tuple[str, str]:
    """Hashes of the tensors of a safetensors file: of the backbone, and of the adapter."""
    hashers = hashlib.sha256(), hashlib.sha256()
    with open(file, "rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name in sorted(header):
            tensor = header[name]
            begin, end = tensor["data_offsets"]
            hasher = hashers[".adapter." in name or ".scaler." in name]
            hasher.update(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
            stream.seek(8 + length + begin)
            while begin < end:
                block = stream.read(min(1 << 20, end - begin))
                if not block:
                    raise ValueError(f"{file.name} ends too early")
                hasher.update(block)
                begin += len(block)
    return hashers[0].hexdigest(), hashers[1].hexdigest()


@dataclass(frozen=True)
class Place:
    """Where an engine runs, and with which libraries.

    Attributes:
        device: A GPU's name, or `cpu`.
        capability: Compute capability such as `9.0`, or the processor's architecture such as `x86_64`.
        instructions: Features of the processor; empty for a GPU.
        versions: Of libraries, by name: torch, cuda, triton, tensorrt, …; those that are not installed are absent.
    """

    device: str
    capability: str
    instructions: tuple[str, ...]
    versions: Mapping[str, str]

    @classmethod
    def here(cls, device: str) -> Place:
        """This machine, seen from a torch device such as `cuda:0` or `cpu`."""
        import torch

        versions = installed_versions()
        if not device.startswith("cuda"):
            return cls("cpu", platform.machine(), _instructions(), versions)
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return cls(name, ".".join(map(str, capability)), (), versions)


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Versions of what engines are built and run with, as far as it is installed."""
    found = {"emt": __version__}
    candidates = {
        "diffusers": ("diffusers",),
        "triton": ("triton",),
        "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        "onnx": ("onnx",),
        "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    }
    for name, packages in candidates.items():
        for package in packages:
            try:
                found[name] = importlib.metadata.version(package)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    import torch

    found["torch"] = str(torch.__version__)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


@functools.cache
def _instructions() -> tuple[str, ...]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    words = match[1].split() if match else []
    return tuple(sorted({word for word in words if _INSTRUCTIONS.fullmatch(word)}))


def code_sha256(*modules: str) -> str:
    """Hash of the source that decides what is compiled: of the network, of all kernels, of the parts, and `modules`."""
    import emt_kernels

    names = ["emt.backbones.sd15.unet", "emt.backbones.sd15.motion_module", "emt_engines.parts", *modules]
    files = [Path(_origin(name)) for name in names]
    files += sorted(Path(emt_kernels.__file__ or "").parent.glob("*.py"))
    listing = [(file.name, sha256_of(file)) for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _origin(module: str) -> str:
    import importlib.util

    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return spec.origin


@dataclass(frozen=True)
class Request:
    """What an engine is wanted for.

    Attributes:
        backend: inductor, tensorrt, tensorrt-rtx or onnx; empty for any.
        precision: fp32, fp16 or bf16.
        device: Where it runs, as torch names it: `cuda:0`, `cpu`.
        sizes: Of clips; none: whichever the engine has.
        frames: Of a clip; 0: as many as the engine has.
        batch: Least and most clips at once; guidance doubles them. Any number fits (0, 0).
        weights: What the network's numbers come from.
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
        """What to type to have such an engine built."""
        words = ["emt", "build-engine", "--model", self.model]
        words += ["--backend", self.backend or "inductor", "--size", ",".join(map(str, self.sizes))]
        words += ["--frames", str(self.frames), "--batch", "..".join(map(str, self.batch))]
        words += ["--precision", self.precision]
        words += ["--device", self.device] if self.device != "cuda:0" else []
        words += [word for lora in self.loras for word in ("--lora", lora)]
        words += [] if self.plugin else ["--no-plugin"]
        return shlex.join(words)


@dataclass(frozen=True)
class Manifest:
    """The record of an engine.

    Attributes:
        backend: What runs it: inductor, tensorrt, tensorrt-rtx or onnx.
        model: What the model was called.
        precision: fp32, fp16 or bf16.
        sizes: Of clips.
        frames: Of a clip.
        batch: Least and most clips at once; guidance doubles them.
        weights: What its numbers come from.
        refits: Whether it takes the model's weights when it is loaded, so that other ones of the same shapes do too.
        code: `code_sha256` of the network and of the module that built it.
        place: Where it was built and with which libraries; of the versions, those that it depends on.
        bound: Whether it runs on the device that it was built on alone.
        opset: Of ONNX; None without.
        parts: Its compiled functions.
        built: When, in ISO 8601.
        seconds: What building took.
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
    place: Place
    bound: bool
    opset: int | None
    parts: tuple[Part, ...]
    built: str
    seconds: float

    @property
    def id(self) -> str:
        """A hash over all of it, 32 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    @property
    def parity(self) -> float | None:
        """The worst of its parts; None if one was not verified."""
        found = [part.parity for part in self.parts]
        return None if None in found or not found else max(p for p in found if p is not None)

    # ---------------------------------------------------------------------------------------------------- may it run

    def match(self, request: Request, place: Place | None = None, code: str | None = None) -> tuple[bool, str]:
        """Whether it may run for a request, and if not, why not, in words.

        Args:
            request: What is wanted.
            place: Where; None for this machine.
            code: `code_sha256` there; None for this program's.
        """
        from emt_engines.build import builder_modules  # it imports this module

        place = place or Place.here(request.device)
        code = code or code_sha256(*builder_modules(self.backend))
        for reason in (
            self._other_kind(request),
            self._other_weights(request.weights),
            "the code of the network has changed since it was built" if code != self.code else "",
            self._other_place(place),
            self._other_shapes(request),
        ):
            if reason:
                return False, reason
        return True, ""

    def covers(self, width: int, height: int, frames: int) -> bool:
        """Whether it takes clips of a size and length."""
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

    def _other_place(self, place: Place) -> str:
        if self.bound and place.device != self.place.device:
            return f"it was built for {self.place.device}, here is {place.device}"
        if self.bound and place.capability != self.place.capability:
            return f"it was built for the compute capability {self.place.capability}, here is {place.capability}"
        missing = set(self.place.instructions) - set(place.instructions) if self.bound else set()
        if missing:
            return f"it was built for a processor with {', '.join(sorted(missing))}, which this one lacks"
        for name, version in self.place.versions.items():
            if place.versions.get(name) != version:
                return f"it was built with {name} {version}, here is {place.versions.get(name, 'none')}"
        return ""

    def _other_shapes(self, request: Request) -> str:
        if request.frames not in (0, self.frames):
            return f"it makes clips of {self.frames} frames, not {request.frames}"
        for size in request.sizes:
            if not any(own.contains(size) for own in self.sizes):
                return f"it makes clips of {', '.join(map(str, self.sizes))} pixels, not {size}"
        if request.batch != (0, 0) and (request.batch[0] < self.batch[0] or request.batch[1] > self.batch[1]):
            own, other = ("..".join(map(str, batch)) for batch in (self.batch, request.batch))
            return f"it makes {own} clips at once, not {other}"
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
            body = json.loads(path.read_bytes())
        except OSError as error:
            raise EmtError(f"{folder} is no engine: {FILE}: {error.strerror}", hint) from None
        except ValueError:
            raise EmtError(f"{path} is damaged: it is not JSON", hint) from None
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise EmtError(f"{path} is of another version of emt", hint)
        try:
            stored = body.pop("id")
            manifest = cls(
                **{
                    **body,
                    "sizes": tuple(Size(tuple(s["least"]), tuple(s["most"])) for s in body["sizes"]),
                    "batch": tuple(body["batch"]),
                    "weights": Weights(
                        body["weights"]["parts"], tuple((s, float(x)) for s, x in body["weights"]["loras"])
                    ),
                    "place": Place(**body["place"] | {"instructions": tuple(body["place"]["instructions"])}),
                    "parts": tuple(_read_part(part) for part in body["parts"]),
                }
            )
            found = manifest.id
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EmtError(f"{path} is damaged: {error!r}", hint) from None
        if found != stored:
            raise EmtError(f"{path} is damaged or was changed: its content does not have its hash", hint)
        return manifest

    def check_files(self, folder: Path) -> None:
        """See that every file of the engine is there as it was built.

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


def _read_part(body: dict[str, Any]) -> Part:
    tensors = {
        side: tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in body[side])
        for side in ("inputs", "outputs")
    }
    shapes = {name: (int(low), int(high)) for name, (low, high) in body["shapes"].items()}
    return Part(**{**body, **tensors, "shapes": shapes})
