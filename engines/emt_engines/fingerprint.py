"""Fingerprints that decide whether an engine may run: of a model's weights, of this machine, of the code."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emt import __version__
from emt.errors import EmtError
from emt.storage import sha256_of

#: Processor features that compilers use, among those that /proc/cpuinfo lists.
_INSTRUCTIONS = re.compile(r"avx\w*|sse\w*|ssse3|amx\w*|fma|f16c|bmi\d|asimd\w*|neon|sve\w*|bf16|i8mm")

#: Packages and modules whose code is compiled into every engine, whatever its backend.
_COMPILED = ("emt.backbones", "emt.backends", "emt.features", "emt_kernels", "emt_engines.parts")


@dataclass(frozen=True)
class Weights:
    """SHA-256 of the weights that an engine is built from.

    Attributes:
        parts: Of `unet` (without the adapter), `adapter`, `vae`, and `config`, the sizes of the networks.
        loras: Of each LoRA merged into them, with its scale, in order.
    """

    parts: Mapping[str, str]
    loras: tuple[tuple[str, float], ...] = ()


#: Memoizes a fact derived from a file's content: (name of the fact, file, function that computes it).
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
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
        if length > os.fstat(stream.fileno()).st_size:
            raise ValueError(f"{file.name} ends too early")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name in sorted(header):
            tensor = header[name]
            begin, end = tensor["data_offsets"]
            hasher = hashers[".adapter." in name or ".scaler." in name or name.startswith("denoising.")]
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
class Host:
    """Device and libraries that an engine was built or is to run with.

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
    def here(cls, device: str) -> Host:
        """This machine, seen from a torch device such as `cuda:0` or `cpu`."""
        import torch

        versions = installed_versions()
        if not device.startswith("cuda"):
            return cls("cpu", platform.machine(), _instructions(), versions)
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return cls(name, ".".join(map(str, capability)), (), versions)


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Versions of the installed libraries that engines are built and run with, by name."""
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


@functools.cache
def code_sha256(*modules: str) -> str:
    """SHA-256 over the source that decides what is compiled: networks, backends, kernels, parts, and `modules`.

    Args:
        modules: Names of the modules that build engines of a backend (`emt_engines.registry.builder_modules`).
    """
    listing = [(file.name, sha256_of(file)) for name in (*_COMPILED, *modules) for file in _sources(name)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _sources(name: str) -> list[Path]:
    """Files of a module, or of all modules of a package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
