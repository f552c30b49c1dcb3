"""A model as seen from outside: where it is, what is missing, its defaults, its hash and what a clip will cost.

Nothing here imports torch, so that a plan over thousands of jobs is there at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from emt import demo
from emt.cache import ContentIndex
from emt.errors import EmtError
from emt.vocabulary import Vocabulary
from emt_cli.batch.options import MODEL_DEFAULTS, Scheduler, Settings, parse_field

_IMPORT = "Make one with `emt import-weights --base … --motion-module … --adapter … -o FOLDER`."
_HOW_TO_GET = f"Leave --model out for the small model, or name a model folder with `--model FOLDER`. {_IMPORT}"
_CONTENT = (".safetensors", ".json", ".txt", ".model")

_LCM_STEPS = 50  # of the distillation, `original_inference_steps` of its scheduler

#: Time of a clip, where the journal has none yet: arithmetic of a denoising step per parameter of the network and
#: latent position of a batch with guidance (35.3 TFLOP for 1.3 G parameters, 16 frames of 512×512), at the rates
#: that are reached on one H100 in fp16 and on two CPU cores in fp32.
_FLOP = 0.204
_GPU_RATE, _CPU_RATE = 336e12, 17e9
#: A step of however small a network takes this long, in seconds: its layers are asked for one by one.
_SHORTEST_STEP = 0.02
#: Memory: the weights, and bytes of activations per pixel of all frames and channel of the first level, in fp16
#: (11.1 GiB in all for the same clip, 320 channels, 2.8 GiB of weights).
_ACTIVATION = 6.6
#: Bytes of a finished clip per pixel of all frames, where the journal has none.
_CLIP_BYTES = 0.25


@dataclass(frozen=True)
class Model:
    """A model folder.

    Attributes:
        name: What the user called it.
        folder: Where it is.
        defaults: Settings that it sets for itself, of `emt_cli.batch.options.MODEL_DEFAULTS`.
    """

    name: str
    folder: Path
    defaults: Mapping[str, Any]

    def sha256(self, index: ContentIndex) -> str:
        """Hash over the names and contents of its weights, configurations and vocabulary."""
        files = sorted(path for path in self.folder.rglob("*") if path.suffix in _CONTENT and path.is_file())
        listing = [(path.relative_to(self.folder).as_posix(), index.sha256(path)) for path in files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part, from the headers of the weight files."""
        return {
            folder.name: sum(_parameters(file) for file in folder.glob("*.safetensors"))
            for folder in self.folder.iterdir()
            if folder.is_dir()
        }

    @cached_property
    def unet(self) -> dict[str, Any]:
        """The configuration of the network."""
        return _read_json(self.folder / "unet" / "config.json")

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The words that it knows; None if it reads any."""
        return Vocabulary.read(self.folder)

    def introduction(self) -> str:
        """What it makes and knows, in a line, for who has not chosen it."""
        made = Settings(**self.defaults)
        known = f" that show {self.vocabulary.count()} (emt doctor lists them)" if self.vocabulary else ""
        return (
            f"model: {self.name}, a small one: clips of {made.frames} frames of {made.width}x{made.height}{known}. "
            "For all else give --model one of Stable Diffusion 1.5: see emt import-weights --help"
        )

    def check(self, settings: Settings, prompt: str = "") -> None:
        """Say whether the model can make clips with these settings, of this prompt.

        Raises:
            EmtError: it cannot.
        """
        if self.vocabulary is not None:
            for text in (prompt, settings.negative_prompt):
                self.vocabulary.check(text)
        most = self.unet.get("motion_max_frames", 32)
        if settings.frames > most:
            raise EmtError(f"frames is {settings.frames}", f"The model {self.name} makes clips of 2 to {most} frames.")
        if settings.scheduler is Scheduler.LCM and settings.steps > _LCM_STEPS:
            raise EmtError(
                f"steps is {settings.steps}", f"The scheduler lcm takes at most {_LCM_STEPS}; 4 to 8 are usual."
            )

    def memory(self, settings: Settings, clips: int = 1, half: bool = True) -> float:
        """Estimated peak memory in bytes for denoising clips together; a model, not a measurement."""
        channels = self.unet.get("block_out_channels", [320])[0]
        pixels = settings.frames * settings.height * settings.width
        weights = 2 * sum(self.parameters.values())
        return (1 if half else 2) * (weights + clips * _ACTIVATION * channels * pixels)

    def seconds(self, settings: Settings, gpu: bool) -> float:
        """Estimated time of a job; a model, not a measurement."""
        flop = _FLOP * self.parameters.get("unet", 0) * work(settings.as_dict())
        return max(flop / (_GPU_RATE if gpu else _CPU_RATE), _SHORTEST_STEP * settings.steps * settings.best_of)

    def size_that_fits(self, settings: Settings, available: float, half: bool) -> str:
        """Options of a smaller clip that should fit, of one that needs more than is available."""
        from dataclasses import replace

        scale = max(1.0, available / self.memory(settings, half=half))  # the model said it would fit: it did not
        for step in range(15, 0, -1):
            width, height = (max(8, side * step // 16 // 8 * 8) for side in (settings.width, settings.height))
            smaller = replace(settings, width=width, height=height)
            if scale * self.memory(smaller, half=half) < 0.9 * available:
                return f"--width {width} --height {height}"
        return f"--frames {max(2, settings.frames // 2)} and the smallest size that serves"


def work(settings: Mapping[str, Any]) -> float:
    """What the time of a job is in proportion to: latent positions of a clip, guidance, steps and candidates.

    Below its highest resolution the network does half of its work.
    """
    guided = 0 if settings["guidance"] == 1 else math.ceil(settings.get("guidance_until", 1) * settings["steps"])
    positions = settings["frames"] * settings["height"] * settings["width"] / 64
    computed = 0.5 + 0.5 / settings.get("cache_interval", 1)
    return positions * (settings["steps"] + guided) * computed * settings.get("best_of", 1)


@dataclass(frozen=True)
class Experience:
    """What earlier runs on the same kind of device with the same model took, from their journal.

    Attributes:
        device: Name of the device.
        jobs: How many finished jobs it is drawn from.
        seconds: A unit of `work`.
        memory: Bytes at the peak, per pixel of all frames.
        size: Bytes of a clip, per pixel of all frames.
    """

    device: str
    jobs: int
    seconds: float
    memory: float
    size: float

    @classmethod
    def read(cls, lines: Iterable[dict[str, Any]], model_sha256: str, device: str) -> Experience | None:
        """The experience of a journal's lines; None if there is none with this model on this device."""
        told = []
        for line in lines:
            if (line.get("state"), line.get("model_sha256"), line.get("device")) != ("done", model_sha256, device):
                continue
            with suppress(
                KeyError, TypeError
            ):  # adopted clips have no timings; lines of other versions may lack others
                settings, timings = line["settings"], line["timings"]
                pixels = settings["frames"] * settings["height"] * settings["width"]
                seconds = timings["steps"] + timings["vae"]
                told.append((seconds / work(settings), line["peak_memory"] / pixels, line["bytes"] / pixels))
        if not told:
            return None
        seconds, memory, size = (median(values) for values in zip(*told))
        return cls(device, len(told), seconds, memory, size)


def clip_bytes(settings: Settings, experience: Experience | None = None) -> float:
    """Estimated size of a finished clip."""
    pixels = settings.frames * settings.height * settings.width
    return pixels * (experience.size if experience else _CLIP_BYTES)


def find_model(name: str | None, *, download: bool) -> Model:
    """The model of `--model`: a folder, a hub id, or `demo`, the small one.

    Args:
        name: What the user gave; None is `demo`. A folder of that name is `./demo`.
        download: Fetch a hub model that is not on this machine yet.

    Raises:
        EmtError: there is no such model, or files of it are missing.
    """
    name = name or demo.NAME
    folder = demo.path() if name == demo.NAME else _locate(name, download)
    listed = _read_json(folder / "model_index.json")
    missing = []
    for part, kind in listed.items():
        if not isinstance(kind, list) or not all(kind):
            continue
        weights = part in ("unet", "vae", "text_encoder")
        if not (folder / part).is_dir() or (weights and not any((folder / part).glob("*.safetensors"))):
            missing.append(f"{part}/*.safetensors" if weights else f"{part}/")
    if missing or "unet" not in listed:
        raise EmtError(f"the model {name} lacks {', '.join(missing) or 'a unet'} (in {folder})", _HOW_TO_GET)
    return Model(name, folder, {key: parse_field(key, listed[key]) for key in MODEL_DEFAULTS if key in listed})


def _locate(name: str, download: bool) -> Path:
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists():
        raise EmtError(f"{name} is not a model folder: it has no model_index.json", _HOW_TO_GET)
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise EmtError(f"there is no model folder {name}", _HOW_TO_GET)
    import huggingface_hub

    try:
        patterns = [f"*{suffix}" for suffix in _CONTENT]
        return Path(huggingface_hub.snapshot_download(name, local_files_only=not download, allow_patterns=patterns))
    except Exception as error:  # network, authentication and cache errors have no common base
        reason = str(error).splitlines()[0] if download else "it is not on this machine yet"
        raise EmtError(f"there is no folder {name}, and no such model from the hub: {reason}", _HOW_TO_GET) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise EmtError(f"cannot read {path}: {error.strerror}", _HOW_TO_GET) from None
    except ValueError:
        raise EmtError(f"{path} is not JSON", _HOW_TO_GET) from None
    if not isinstance(value, dict):
        raise EmtError(f"{path} is not a JSON object", _HOW_TO_GET)
    return value


def _parameters(path: Path) -> int:
    """Parameters in a safetensors file, from its header."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        total = 0
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                total += (end - begin) // {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(tensor["dtype"], 8)
        return total
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError, OverflowError):
        raise EmtError(f"{path} is damaged", _HOW_TO_GET) from None
