"""Features that a backbone reads once, of a reference and of a prompt, and uses in every step of denoising.

A backbone fills them by path of its layers; everything else moves, keeps and joins them without knowing what they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emt.errors import EmtError
from emt.storage import apply_umask


@dataclass
class TextFeatures:
    """Cross-attention keys and values of prompts, constants over steps and frames.

    `layers` maps the path of a layer to its keys and values, each (batch, …); of prompts that change over a clip they
    are of each frame, (batch·frames, …). `guided` promises that the batch is doubled for classifier-free guidance: both
    halves of its samples are the same.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    guided: bool = False


@dataclass
class MotionFeatures:
    """The motion of n references, read in one pass over them (`emt.backbone.Backbone.encode_reference`).

    `layers` maps the path of a layer that takes the reference to its features, each (n, …).
    """

    layers: dict[str, tuple[Tensor, ...]]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MotionFeatures:
        """The same features on another device or in another dtype."""
        return MotionFeatures({path: tuple(x.to(device, dtype) for x in layer) for path, layer in self.layers.items()})


@dataclass
class PreparedMotion:
    """References' motion, ready for denoising (`emt.backbone.Backbone.prepare`).

    `layers` maps the path of a layer that takes the reference to dataclasses of tensors, the backbone's own.
    """

    layers: Mapping[str, tuple[Any, ...]]


for _dataclass in (TextFeatures, MotionFeatures, PreparedMotion):
    torch.export.register_dataclass(_dataclass)


def tensors_of(features: TextFeatures | MotionFeatures | PreparedMotion | None) -> Iterator[Tensor]:
    """All tensors of features, in a fixed order."""
    for layer in features.layers.values() if features is not None else ():
        yield from layer_tensors(layer)


def layer_tensors(layer: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors of one layer's features: its own, or those of its dataclasses."""
    for part in layer:
        if isinstance(part, Tensor):
            yield part
        else:
            yield from (getattr(part, field.name) for field in fields(part))


@dataclass
class Motion:
    """The motion of one reference clip, read once, good for every prompt, seed and step.

    Args:
        features: of one reference.
        frames: frames of the clip.
        height: pixels.
        width: pixels.
        seed: of the reference's sampled latents and noise.
    """

    features: MotionFeatures
    frames: int
    height: int
    width: int
    seed: int

    @property
    def references(self) -> int:
        """References that its features are of: one, or those of a batch."""
        return next(tensors_of(self.features)).shape[0]

    @property
    def bytes(self) -> int:
        """Bytes of its features."""
        return sum(x.numel() * x.element_size() for x in tensors_of(self.features))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Motion:
        """The same motion on another device or in another dtype."""
        return Motion(self.features.to(device, dtype), self.frames, self.height, self.width, self.seed)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {
            f"{layer}/{i}": feature.contiguous()
            for layer, features in self.features.layers.items()
            for i, feature in enumerate(features)
        }
        shape = {"frames": self.frames, "height": self.height, "width": self.width, "seed": self.seed}
        # The order of the layers is not the sorted order of their names once there are ten of a kind.
        save_file(tensors, path, {"motion": json.dumps(shape | {"layers": list(self.features.layers)})})
        apply_umask(Path(path))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Motion:
        """Read a file that `save` wrote.

        Raises:
            EmtError: if the file is damaged or no motion.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                shape = json.loads((file.metadata() or {})["motion"])
                found: dict[str, list[Tensor]] = {layer: [] for layer in shape.pop("layers")}
                names = set(file.keys())
                for layer, features in found.items():
                    while (name := f"{layer}/{len(features)}") in names:
                        features.append(file.get_tensor(name))
                if sum(map(len, found.values())) != len(names) or not all(found.values()):
                    raise ValueError("its tensors are not those of its layers")
                if not all(type(value) is int for value in shape.values()):
                    raise ValueError("its shape is not of whole numbers")
                return cls(MotionFeatures({layer: tuple(features) for layer, features in found.items()}), **shape)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise EmtError(f"{path} is not a motion file: {error}", "Read the motion from the clip again.") from error


def in_dtype(motions: Motion | Sequence[Motion], dtype: torch.dtype) -> list[Motion]:
    """The same motion or motions, for a network of another dtype than read them, or that read what a file keeps.

    Hidden states are converted, (n, frames, height, width, channels); numbers beside them stay as they are. A motion
    that is there several times is one object still (`joined`).

    Raises:
        TypeError: one of them is something else.
    """
    motions = list(motions) if isinstance(motions, Sequence) and not isinstance(motions, str) else [motions]
    found: dict[int, Motion] = {}
    for motion in motions:
        if not isinstance(motion, Motion):
            allowed = "what extract_motion returns or Motion.load reads, or a list of such"
            raise TypeError(f"motion is {motion!r:.100}, allowed is {allowed}")
        if id(motion) in found:
            continue
        layers = {
            path: tuple(x.to(dtype) if x.ndim == 5 else x for x in layer)
            for path, layer in motion.features.layers.items()
        }
        as_is = all(x is y for path, layer in layers.items() for x, y in zip(layer, motion.features.layers[path]))
        found[id(motion)] = motion if as_is else replace(motion, features=MotionFeatures(layers))
    return [found[id(motion)] for motion in motions]


def joined(motions: Sequence[Motion]) -> MotionFeatures:
    """One set of features for a batch; a motion that serves the whole batch is not repeated."""
    if all(m is motions[0] for m in motions):
        return motions[0].features
    layers = {}
    for path in motions[0].features.layers:
        parts = zip(*(m.features.layers[path] for m in motions), strict=True)
        layers[path] = tuple(torch.cat(part) for part in parts)
    return MotionFeatures(layers)
