"""Table of the engine backends: their modules, builders and runtimes, imported when they are first used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from emt.backbone import PUBLISHED
from emt.errors import EmtError


@dataclass(frozen=True)
class Entry:
    """Names of a backend's module and of the classes in it.

    Attributes:
        module: The module.
        builder: Its `emt_engines.base.Builder`.
        runtime: Its `emt.backends.torch.Backend`, constructed as `Runtime(folder, manifest, pipe)`; raises
            `emt_engines.base.CannotRun` where this machine cannot run such engines.
        uses: Other modules whose code ends up in an engine.
        any_network: It builds engines of any network, not of the published method's alone.
    """

    module: str
    builder: str
    runtime: str
    uses: tuple[str, ...] = ()
    any_network: bool = False


#: Engines of TensorRT begin as the file of the ONNX exporter, and may embed the plugin.
_TENSORRT = ("emt_engines.products", "emt_engines.onnx_export", "emt_engines.plugin")

#: By the value of `--backend`.
BACKENDS = {
    "inductor": Entry("emt_engines.inductor", "InductorBuilder", "InductorBackend", any_network=True),
    "onnx": Entry("emt_engines.onnx_export", "OnnxBuilder", "OnnxBackend"),
    "tensorrt": Entry("emt_engines.tensorrt", "TensorRTBuilder", "TensorRTBackend", _TENSORRT),
    "tensorrt-rtx": Entry("emt_engines.tensorrt", "TensorRTRTXBuilder", "TensorRTRTXBackend", _TENSORRT),
}


def check_network(name: str, network: str, backend: str) -> None:
    """Raise EmtError unless a backend builds engines of a network.

    Args:
        name: What the user calls the model.
        network: Of `emt.backbone.BACKBONES`.
        backend: Of `BACKENDS`.
    """
    if network != PUBLISHED and not find(backend).any_network:
        able = ", ".join(known for known, entry in BACKENDS.items() if entry.any_network)
        raise EmtError(
            f"the backend {backend} builds no engines of the network of {name}, {network}", f"Use --backend {able}."
        )


def find(backend: str) -> Entry:
    """The entry of a backend.

    Raises:
        EmtError: there is no such backend.
    """
    try:
        return BACKENDS[backend]
    except KeyError:
        raise EmtError(f"there is no backend {backend!r}", f"Allowed are {', '.join(BACKENDS)}.") from None


def load_builder(backend: str) -> Any:
    """The builder class of a backend.

    Raises:
        EmtError: there is no such backend.
    """
    entry = find(backend)
    return getattr(importlib.import_module(entry.module), entry.builder)


def load_runtime(backend: str) -> Any:
    """The class that runs engines of a backend.

    Raises:
        EmtError: there is no such backend.
    """
    entry = find(backend)
    return getattr(importlib.import_module(entry.module), entry.runtime)


def builder_modules(backend: str) -> tuple[str, ...]:
    """Names of the modules that decide what is in an engine of a backend; `code_sha256` hashes them.

    Raises:
        EmtError: there is no such backend.
    """
    entry = find(backend)
    return (entry.module, *entry.uses)
