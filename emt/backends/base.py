"""Protocols of what executes a pipeline's network and VAE, and of the parts that it executes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from emt.backbone import Backbone
from emt.features import MotionFeatures, PreparedMotion, TextFeatures


class Networks(Protocol):
    """The parts that a backend executes, and their sizes: a pipeline, or networks with any weights in its place."""

    unet: Any  # a `Backbone`
    vae: Any
    tokenizer: Any
    vae_scale_factor: int

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        ...


class Backend(Protocol):
    """Executes the network and the VAE for a pipeline (`MotionTransferPipeline.backend`)."""

    name: str
    #: Whether it has `denoise_deep` and `denoise_shallow`.
    reuses: bool = False

    @property
    def unet(self) -> Backbone:
        """The network, whose weights prepare text and motion in every case."""
        ...

    def encode_reference(self, latents: Tensor, timestep: Tensor, text: Tensor) -> MotionFeatures:
        """`emt.backbone.Backbone.encode_reference`."""
        ...

    def prepare_motion(self, features: MotionFeatures) -> PreparedMotion:
        """Prepare the constants of references for all steps; good until motion of the same shape is prepared.

        Classes that derive from this one inherit it.
        """
        return self.unet.prepare(features.to(self.unet.device))

    def denoise(self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Tensor:
        """One call of the network, on a batch with classifier-free guidance or without."""
        ...

    def denoise_controlled(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: TextFeatures,
        motion: PreparedMotion | None,
        control: Sequence[Tensor],
    ) -> Tensor:
        """`denoise` with the residuals of a control network, (batch·frames, …) each."""
        raise NotImplementedError(f"the backend {self.name} takes no control network")

    def denoise_deep(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None
    ) -> tuple[Tensor, Tensor]:
        """`ReusingBackbone.denoise_deep`; the deep features are good until the next call of the same shape."""
        raise NotImplementedError(f"the backend {self.name} does not give deep features")

    def denoise_shallow(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None, deep: Tensor
    ) -> Tensor:
        """`ReusingBackbone.denoise_shallow`."""
        raise NotImplementedError(f"the backend {self.name} does not take deep features")

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents (n, channels, h/8, w/8) of images (n, 3, h, w) from -1 to 1."""
        ...

    def decode_images(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) from about -1 to 1 of latents (n, channels, h/8, w/8), not scaled."""
        ...


class PipelineBackend(Backend):
    """A backend of one pipeline, which it does not keep alive: the pipeline has the backend.

    Attributes:
        phase: Makes a context manager for what the host prepares while the device may wait, by its name.
    """

    phase: Callable[[str], AbstractContextManager[Any]]

    def __init__(self, pipe: Networks) -> None:
        self._pipe = weakref.ref(pipe)
        self.phase = nullcontext

    def prepare_shape(self, frames: int, height: int, width: int) -> None:
        """Prepare for clips of a shape before the first reference is there: of images, not of video."""

    @property
    def pipe(self) -> Networks:
        """The pipeline whose parts it runs."""
        pipe = self._pipe()
        assert pipe is not None, "the pipeline of this backend is gone"
        return pipe

    @property
    def unet(self) -> Any:
        """The pipeline's network, which prepares text and motion."""
        return self.pipe.unet
