"""Denoising with little memory: references prepared layer by layer, samples one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from emt.backbone import Backbone
from emt.features import MotionFeatures, PreparedMotion, TextFeatures

#: Tokens that a feed-forward layer takes at once: 30 MB in place of 250 at 512×512.
FEED_FORWARD_TOKENS = 4096


class LayerByLayer(Mapping[str, tuple[Any, ...]]):
    """Prepares what a layer needs of references on access, and keeps nothing.

    Args:
        unet: the network.
        features: of references; they may be in the computer's memory.
    """

    def __init__(self, unet: Backbone, features: MotionFeatures) -> None:
        self.features = features
        self._layers = unet.reference_layers()
        self._unet = unet

    def __getitem__(self, path: str) -> tuple[Any, ...]:
        device = self._unet.device
        return self._unet.prepare_layer(path, tuple(feature.to(device) for feature in self.features.layers[path]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def part(self, i: int) -> LayerByLayer:
        """The same for the reference of sample i of a batch."""
        layers = {}
        for path, features in self.features.layers.items():
            j = i % len(features[0])
            layers[path] = tuple(feature[j : j + 1] for feature in features)
        return LayerByLayer(self._unet, MotionFeatures(layers))


def each_sample(sample: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Iterator[tuple[Any, ...]]:
    """Each sample of a batch with its own text and motion."""
    count = len(sample)
    pairs = {path: (key.chunk(count), value.chunk(count)) for path, (key, value) in text.layers.items()}
    for i, part in enumerate(sample.split(1)):
        own = TextFeatures({path: (keys[i], values[i]) for path, (keys, values) in pairs.items()})
        if motion is None:
            yield part, own, None
            continue
        assert isinstance(motion.layers, LayerByLayer), "this motion was prepared by another backend"
        yield part, own, PreparedMotion(motion.layers.part(i))
