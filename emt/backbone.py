"""A backbone as the pipeline, the backends, training and engines use it, and the table of those that there are.

A backbone is a video network with an adapter: it reads the motion of a reference in one pass, and denoises clips with
it. Nothing outside its own folder below `emt.backbones` names its classes. Nothing here imports torch, so that a plan
over thousands of jobs can look up a network's limits and costs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from emt.features import MotionFeatures, PreparedMotion, TextFeatures

#: Networks by the class that `model_index.json` names: the module that it names with it, which diffusers opens only
#: once it has been imported; and the network's package, whose modules `module_of` gives.
BACKBONES = {
    "MotionTransferUNet": ("emt.unet", "emt.backbones.sd15"),
    "WanMotionTransferTransformer": ("emt.backbones.wan21.transformer", "emt.backbones.wan21"),
}
#: The network of the published method, which is meant where no model is named.
PUBLISHED = "MotionTransferUNet"

#: Networks whose package has `switching`: clips may have LoRAs, a VAE and embeddings of their own.
SWITCHING = ("MotionTransferUNet",)

#: Networks with a module `opening`, which opens a model folder without diffusers and transformers.
OPENED_DIRECTLY = ("MotionTransferUNet",)

#: Text encoders that are too large to be open beside a network, by the class that `model_index.json` names: prompts are
#: encoded apart (`emt.prompts`).
LARGE_TEXT_ENCODERS = ("UMT5EncoderModel",)


@dataclass(frozen=True)
class Facts:
    """Limits and costs of a network, which follow from its configuration alone.

    Attributes:
        max_frames: most frames that it takes at once.
        frame_step: frames of every latent frame but the first.
        grid_step: height and width of latents are multiples of this.
        even_step: multiples of this are halved evenly from level to level, as graphs for any size need it.
        flop: floating-point operations of a pass for each parameter and latent position, of which there are
            frames·height·width/64.
        activation_bytes: memory at the peak for each pixel of all frames, in half precision.
        attention_flop: floating-point operations of attention between all positions, for each pair of them.
        first_frames: frames of the first latent frame.
        windows: clips of more than `max_frames` frames are made window by window (`emt.windows`), as the features of
            references are (n, latent frames, …), or (n,) where they are of no frame.
        motion_guidance: its attention over time can guide a clip without an adapter (`emt.train.teacher`).
        guided_blocks: blocks whose attention is compared then; none for those that the guidance names.
    """

    max_frames: int
    frame_step: int
    grid_step: int
    even_step: int
    flop: float
    activation_bytes: float
    attention_flop: float = 0.0
    first_frames: int = 1
    windows: bool = False
    motion_guidance: bool = False
    guided_blocks: tuple[int, ...] = ()

    def makes_frames(self, frames: int) -> bool:
        """Return whether clips may have so many frames."""
        return frames >= 2 and (self.windows or frames <= self.max_frames) and self._fit(frames)

    def allowed_clips(self) -> str:
        """The numbers of frames that clips may have, in words."""
        if not self.windows:
            return self.allowed_frames()
        return "2 or more" if self.frame_step == 1 else f"{self._least}, {self._least + self.frame_step}, …"

    def takes_frames(self, frames: int) -> bool:
        """Return whether the network takes so many frames at once."""
        return 2 <= frames <= self.max_frames and self._fit(frames)

    def allowed_frames(self) -> str:
        """The numbers of frames that the network takes at once, in words."""
        if self.frame_step == 1:
            return f"2 to {self.max_frames}"
        return f"{self._least}, {self._least + self.frame_step}, … up to {self.max_frames}"

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of so many frames that it makes."""
        return 1 + (frames - self.first_frames) // self.frame_step

    def frames_of(self, latents: slice) -> slice:
        """The frames that some latent frames are of."""
        start, stop = ((n > 0) * (self.first_frames + (n - 1) * self.frame_step) for n in (latents.start, latents.stop))
        return slice(start, stop)

    @property
    def _least(self) -> int:
        return self.first_frames if self.first_frames > 1 else 1 + self.frame_step

    def _fit(self, frames: int) -> bool:
        return (frames - self.first_frames) % self.frame_step == 0


def counts(config: Mapping[str, Any], name: str, default: list[int]) -> list[int]:
    """Positive numbers of a configuration, one or a list of them.

    Raises:
        ValueError: they are something else.
    """
    value = config.get(name, default)
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values or not all(type(number) is int and number > 0 for number in values):
        raise ValueError(f"{name} is {value!r:.100}")
    return values


def facts_of(name: str, config: Mapping[str, Any]) -> Facts:
    """Limits and costs of a network of the class `name` with this configuration; imports no torch.

    Raises:
        KeyError: there is no such network.
        ValueError: a value of the configuration makes no sense; it is named.
    """
    return module_of(name, "facts").facts(config)


def module_of(network: str, name: str) -> ModuleType:
    """A module of the package of a network: `facts`, which imports no torch, `import_weights`, `lora`, `random_model`.

    Raises:
        KeyError: there is no such network.
    """
    return importlib.import_module(f"{BACKBONES[network][1]}.{name}")


def import_backbones(index: Mapping[str, Any]) -> None:
    """Import the modules of the networks that a `model_index.json` names, given its content, so that diffusers can."""
    for entry in index.values():
        if isinstance(entry, list) and len(entry) == 2 and entry[1] in BACKBONES:
            importlib.import_module(BACKBONES[entry[1]][0])


class Constants:
    """Tensors that follow from weights alone: computed once, and kept where they are for captured calls.

    Weights that are written in place need `refresh`; those that are moved, a new object.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[Tensor, Callable[[], Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key, which `compute` makes of weights and of other constants."""
        if key not in self._kept:
            self._kept[key] = compute(), compute
        return self._kept[key][0]

    def refresh(self) -> Tensor:
        """Compute all of them again, in place, in the order in which they came; the last one, of one or more."""
        for tensor, compute in self._kept.values():
            tensor.copy_(compute())
        return tensor


@dataclass(frozen=True)
class Execution:
    """Options of a pass through a network. Results agree to rounding.

    What is fused is so at inference alone, not while gradients, autocast or `torch.compile` need layers apart.

    Attributes:
        fuse_residual_adds: matmuls add their result to the residual stream themselves, in place.
        defer_conv_biases: with that, biases of convolutions are added by the norms that read what they made.
        feed_forward_tokens: tokens that a feed-forward layer takes at once: fewer take less memory and more time.
        features_on_host: move what a reference pass reads to the computer's memory, layer by layer.
        share_guidance: compute once what the halves of a batch with guidance have in common (`TextFeatures.guided`).
        join_skips: with fused residual adds, read skip connections where they are instead of copying them beside what
            they join.
        constants: what follows from weights alone, kept for all passes; None computes it in each.
    """

    fuse_residual_adds: bool = False
    defer_conv_biases: bool = False
    feed_forward_tokens: int = 32_768
    features_on_host: bool = False
    share_guidance: bool = True
    join_skips: bool = False
    constants: Constants | None = None


PLAIN = Execution()


class Backbone(Protocol):
    """A video network that takes the motion of references; a `torch.nn.Module` and a model of diffusers.

    Optional are `denoise_deep` and `denoise_shallow` (`ReusingBackbone`), and what a teacher needs
    (`TeachingBackbone`).
    """

    config: Any

    @property
    def facts(self) -> Facts:
        """Limits and costs."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that it denoises."""
        ...

    @property
    def text_width(self) -> int:
        """Width of the prompts' encoding that it reads."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        ...

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None = None,
        *,
        execution: Execution = PLAIN,
    ) -> Tensor:
        """The prediction for noisy latents (batch, channels, frames, height, width), shaped as they are.

        Sample i follows reference i mod n of n, a divisor of the batch, so that both halves of a batch with
        classifier-free guidance share one.
        """
        ...

    def encode_reference(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        *,
        execution: Execution = PLAIN,
    ) -> MotionFeatures:
        """The motion of noisy references (n, channels, frames, height, width), in one pass without the adapter."""
        ...

    def encode_text(self, text: Tensor) -> TextFeatures:
        """Features of prompts for denoising, from their encoding (batch, tokens, width)."""
        ...

    def reference_layers(self) -> list[str]:
        """Paths of the layers that take a reference, in the order in which they run: the keys of its features."""
        ...

    def prepare_layer(self, path: str, features: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Constants of references in a layer, for all steps, from their features."""
        ...

    def prepare(self, features: MotionFeatures) -> PreparedMotion:
        """`prepare_layer` for all layers."""
        ...

    def fuse_projections(self) -> None:
        """Let inference compute query, key and value of each self-attention in one matmul."""
        ...

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that are trained, by name in the state dict."""
        ...

    def initialize_adapter(self) -> None:
        """Bring the adapter to where training starts."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of `torch.nn.Module`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of `torch.nn.Module`."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Of `torch.nn.Module`."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Of diffusers' models."""
        ...


class ReusingBackbone(Backbone, Protocol):
    """A backbone whose deep features serve several steps (DeepCache, Ma et al. 2023, arXiv 2312.00858)."""

    def denoise_deep(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None = None,
        *,
        execution: Execution = PLAIN,
    ) -> tuple[Tensor, Tensor]:
        """The prediction and the deep features, batch (and frames) first."""
        ...

    def denoise_shallow(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None,
        deep: Tensor,
        *,
        execution: Execution = PLAIN,
    ) -> Tensor:
        """The prediction with deep features of an earlier step."""
        ...


class TeachingBackbone(Backbone, Protocol):
    """A backbone whose attention over time shows how things move, for `emt.train.teacher`."""

    def denoise_with_features(
        self, sample: Tensor, timestep: Tensor | float, text: Tensor | TextFeatures
    ) -> tuple[Tensor, MotionFeatures]:
        """The prediction without the adapter, and the motion that was read on the way; both differentiable."""
        ...

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor | TextFeatures,
        motion: MotionFeatures | PreparedMotion | None = None,
        *,
        adapted: bool = True,
        execution: Execution = PLAIN,
    ) -> Tensor:
        """As `Backbone.__call__`; `adapted=False` runs the backbone without the adapter."""
        ...

    def encode_text_without_adapter(self, text: Tensor) -> TextFeatures:
        """Features of prompts for passes without the adapter, from their encoding (batch, tokens, width)."""
        ...

    def attention_maps(self, features: MotionFeatures, blocks: tuple[int, ...]) -> list[Tensor]:
        """Attention over time in some blocks, from features: (batch, …, places) each, of which rows sum to 1."""
        ...
