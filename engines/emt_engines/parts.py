"""The functions that an engine compiles, with flat tensors in and out under names that do not change.

| part | inputs | outputs |
|---|---|---|
| denoise | sample, timestep, text/…, motion/… | prediction |
| reference | latents, timestep, text | feature/… |
| vae_encoder | images | mean, std |
| vae_decoder | latents | images |

The VAE's parts are of an autoencoder of images.

An engine takes one reference at a time: its samples all follow that one, so that a clip needs one copy of its motion
whatever the batch. Samples of several references are as many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from emt.backbone import PLAIN, Execution
from emt.backends.base import Networks
from emt.backends.codec import codec_of
from emt.errors import EmtError
from emt.features import MotionFeatures, PreparedMotion, TextFeatures
from emt.prompts import TOKENS
from emt_engines.manifest import TensorSpec

_PAIR = ("key", "value")


def text_tensors(text: TextFeatures) -> dict[str, Tensor]:
    """Keys and values of a prompt, by the name of the input: ``text/<transformer>/key``."""
    return {f"text/{path}/{side}": x for path, pair in text.layers.items() for side, x in zip(_PAIR, pair)}


def motion_tensors(motion: PreparedMotion) -> dict[str, Tensor]:
    """A reference's tensors, by the name of the input: ``motion/<layer>/<its number in the layer>/<field>``."""
    return {
        f"motion/{path}/{i}/{field.name}": getattr(prepared, field.name)
        for path, layer in motion.layers.items()
        for i, prepared in enumerate(layer)
        for field in fields(prepared)
    }


def feature_tensors(features: MotionFeatures) -> dict[str, Tensor]:
    """Outputs of a reference pass, by name: ``feature/<layer>/<its number in the layer>``."""
    return {f"feature/{path}/{i}": x for path, layer in features.layers.items() for i, x in enumerate(layer)}


def features_of(tensors: Mapping[str, Tensor]) -> MotionFeatures:
    """The inverse of `feature_tensors`."""
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.split("/")[1], []).append(tensor)
    return MotionFeatures({path: tuple(layer) for path, layer in layers.items()})


def times_of(timestep: Tensor, samples: Tensor) -> Tensor:
    """The timestep of each sample, (samples,) float32, of one for all or of each."""
    return torch.as_tensor(timestep, device=samples.device).float().expand(samples.shape[0])


def by_reference(
    sample: Tensor,
    timestep: Tensor,
    text: TextFeatures,
    motion: PreparedMotion | None,
    call: Callable[[dict[str, Tensor]], Tensor],
) -> Tensor:
    """The prediction for samples of which sample i follows reference i mod their number: a call for each reference.

    Args:
        sample: as the network takes it.
        timestep: as the network takes it.
        text: as the network takes it.
        motion: as the network takes it.
        call: the part that denoises, on its inputs by name.

    Raises:
        EmtError: there is no reference.
    """
    if motion is None:
        raise EmtError(
            "an engine makes no clips without a reference",
            "Give the pipeline a motion, or no engine: pipe.backend = emt.backends.torch.TorchBackend(pipe).",
        )
    own = {"sample": sample, "timestep": times_of(timestep, sample), **text_tensors(text)}
    shared = motion_tensors(motion)
    count = next((x.shape[0] for name, x in shared.items() if name.endswith("/key")), 1)
    if count == 1:
        return call(own | shared)
    found = []
    for i in range(count):
        inputs = {name: x[i::count] for name, x in own.items()}
        inputs |= {name: x if "/position_" in name else x[i : i + 1] for name, x in shared.items()}
        found.append(call(inputs))
    return torch.stack(found, dim=1).flatten(0, 1)


def text_tokens(pipe: Networks) -> int:
    """Tokens of a prompt's encoding, as the network gets it."""
    apart = getattr(pipe, "prompt_encoder", None) is not None
    return TOKENS if apart else int(pipe.tokenizer.model_max_length)


class Denoise(nn.Module):
    """The network, taking text and motion as the tensors of `text_tensors` and `motion_tensors`, in order.

    Args:
        unet: the network.
        text: an example of the text.
        motion: an example of the motion.
        execution: how a call is computed.
    """

    def __init__(self, unet: Any, text: TextFeatures, motion: PreparedMotion, execution: Execution) -> None:
        super().__init__()
        self.unet, self.execution = unet, execution
        self.text, self.motion = tuple(text_tensors(text)), tuple(motion_tensors(motion))
        self._classes = {path: tuple(type(prepared) for prepared in layer) for path, layer in motion.layers.items()}

    def forward(self, sample: Tensor, timestep: Tensor, *tensors: Tensor) -> Tensor:
        """(samples, channels, frames, height, width) and (samples,) → the prediction, shaped as the sample."""
        text: dict[str, list[Tensor]] = {}
        motion: dict[str, list[dict[str, Tensor]]] = {path: [{} for _ in c] for path, c in self._classes.items()}
        for name, tensor in zip(self.text + self.motion, tensors, strict=True):
            kind, path, *rest = name.split("/")
            if kind == "text":
                text.setdefault(path, []).append(tensor)
            else:
                motion[path][int(rest[0])][rest[1]] = tensor
        features = TextFeatures({path: (pair[0], pair[1]) for path, pair in text.items()})
        layers = {p: tuple(c(**given) for c, given in zip(self._classes[p], layer)) for p, layer in motion.items()}
        return self.unet(sample, timestep, features, PreparedMotion(layers), execution=self.execution)


class Reference(nn.Module):
    """The reference pass, returning the tensors of `feature_tensors`, in order."""

    def __init__(self, unet: Any, execution: Execution) -> None:
        super().__init__()
        self.unet, self.execution = unet, execution

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """(1, channels, frames, height, width), (1,) and (1, tokens, width) → features."""
        features = self.unet.encode_reference(latents, timestep, text, execution=self.execution)
        return tuple(feature_tensors(features).values())


class VaeEncoder(nn.Module):
    """The VAE's encoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(images, 3, height, width) from -1 to 1 → mean and standard deviation (images, channels, h/8, w/8)."""
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean, posterior.std


class VaeDecoder(nn.Module):
    """The VAE's decoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """(images, channels, h/8, w/8), not scaled → (images, 3, height, width)."""
        return self.vae.decode(latents).sample


@dataclass
class Function:
    """A part to compile: the module, example inputs by name, and the names of its outputs.

    `varying` names the dimension that varies in all inputs that have it first: `samples`; empty if none does.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    varying: str = ""

    def varies(self, name: str) -> bool:
        """Return whether the first dimension of an input varies."""
        return bool(self.varying) and not name.startswith("motion/")

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """The inputs as a manifest describes them."""
        return tuple(self._spec(name, x, self.varies(name)) for name, x in self.inputs.items())

    def output_specs(self, outputs: Sequence[Tensor]) -> tuple[TensorSpec, ...]:
        """The outputs, of which `outputs` are examples, as a manifest describes them."""
        return tuple(self._spec(name, x, bool(self.varying)) for name, x in zip(self.outputs, outputs, strict=True))

    def _spec(self, name: str, x: Tensor, varies: bool) -> TensorSpec:
        shape: list[int | str] = list(x.shape)
        if varies:
            shape[0] = self.varying
        return TensorSpec(name, str(x.dtype).removeprefix("torch."), tuple(shape))


@torch.no_grad()
def function(
    pipe: Networks,
    name: str,
    *,
    width: int,
    height: int,
    frames: int,
    samples: int = 1,
    images: int = 1,
    prepare: Callable[[MotionFeatures], PreparedMotion] | None = None,
    execution: Execution = PLAIN,
) -> Function:
    """One part of an engine for a size, with examples of its inputs laid out in memory as they will be.

    Args:
        pipe: The model, on its device.
        name: Of the part, see `emt_engines.manifest.Part`.
        width: Pixels.
        height: Pixels.
        frames: Of a clip, of which an autoencoder of video, or one whose frames are packed, makes fewer of latents.
        samples: Of the example, for `denoise`.
        images: Of the example, for the parts of the VAE.
        prepare: Prepares motion at run time, if not the network itself.
        execution: How the network is computed.
    """
    unet, factor = pipe.unet, pipe.vae_scale_factor
    options: dict[str, Any] = {"device": pipe.device, "dtype": unet.dtype}
    grid = height // factor, width // factor
    latent_frames = codec_of(pipe.vae, unet.latent_channels).latent_frames(frames)

    def clips(count: int) -> Tensor:
        return torch.randn(count, unet.latent_channels, latent_frames, *grid, **options)

    def text(count: int) -> Tensor:
        return torch.randn(count, text_tokens(pipe), unet.text_width, **options)

    def times(count: int) -> Tensor:
        return torch.full((count,), 400.0, device=pipe.device)

    if name == "reference":
        inputs = {"latents": clips(1), "timestep": times(1), "text": text(1)}
        features = unet.encode_reference(*inputs.values(), execution=execution)
        return Function(Reference(unet, execution), inputs, tuple(feature_tensors(features)))
    if name == "vae_encoder":
        pixels = torch.randn(images, 3, height, width, **options)
        return Function(VaeEncoder(pipe.vae), {"images": pixels}, ("mean", "std"))
    if name == "vae_decoder":
        latents = torch.randn(images, pipe.vae.config.latent_channels, *grid, **options)
        return Function(VaeDecoder(pipe.vae), {"latents": latents}, ("images",))
    prompts = unet.encode_text(text(samples))
    features = unet.encode_reference(clips(1), times(1), text(1), execution=execution)
    motion = prepare(features) if prepare else unet.prepare(features)
    known = text_tensors(prompts) | motion_tensors(motion)
    inputs = {"sample": clips(samples), "timestep": times(samples), **known}
    return Function(Denoise(unet, prompts, motion, execution), inputs, ("prediction",), "samples")
