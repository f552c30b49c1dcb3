"""Pictures that some frames of a clip are to show, by a control network beside the denoising network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emt.backends.vae import encode_exactly, is_finite

if TYPE_CHECKING:
    from emt.pipeline import MotionTransfer


@dataclass(frozen=True)
class Control:
    """Pictures of a clip, and the network that reads them.

    Attributes:
        network: of the network's package (`sparse_control`), on the pipeline's device, in its dtype.
        pictures: of frames, counted from 0: uint8 (height, width, 3) in the clip's size.
        scale: factor of what the network adds; 0 is without.
    """

    network: Any
    pictures: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)
    scale: float = 1.0


class ControlledSteps:
    """Residuals of a control network for each step of a batch.

    Args:
        pipe: whose clips they are.
        controls: of each clip, with one network and one scale; or one of all.
        text: encoding of the negative prompts, if there is guidance, and of the prompts: (n, tokens, width), or of each
            frame.
        guided: whether there is guidance.
        clips: of the batch.
        shape: frames, height and width of the clips.

    Raises:
        ValueError: for a picture of a frame that is not there, or of another size; for another number of controls.
    """

    def __init__(
        self,
        pipe: MotionTransfer,
        controls: Sequence[Control],
        text: Tensor,
        guided: bool,
        clips: int,
        shape: tuple[int, int, int],
    ) -> None:
        if len(controls) not in (1, clips):
            raise ValueError(f"control has {len(controls)} entries, expected 1 or {clips}")
        self._network, self._scale = controls[0].network, controls[0].scale
        pictures, mask = zip(*(_read(pipe, control, shape) for control in controls))
        count = clips if len(controls) == 1 else 1
        self._given = [torch.cat(part).repeat(count, 1, 1, 1, 1) for part in (pictures, mask)]
        self._both = [part.repeat(2, 1, 1, 1, 1) for part in self._given] if guided else self._given
        self._clips = clips
        self._alone = self._network.encode_text(text[len(text) // 2 :] if guided else text)
        self._text = self._network.encode_text(text) if guided else self._alone

    def __call__(self, timestep: Tensor, samples: int) -> list[Tensor]:
        """Residuals of a step for the clips or, with guidance, for both halves of a batch: (samples·frames, …) each."""
        text, given = (self._alone, self._given) if samples == self._clips else (self._text, self._both)
        return self._network(timestep, text, *given, self._scale)


def _read(pipe: MotionTransfer, control: Control, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Pictures of one clip as the network takes them, (1, channels, frames, …), and their mask (1, 1, frames, …)."""
    frames, height, width = shape
    at = sorted(control.pictures)
    if not at or at[0] < 0 or at[-1] >= frames:
        raise ValueError(f"control pictures are of frames {at}, allowed are 0 to {frames - 1}, one at least")
    given = np.stack([control.pictures[i] for i in at])
    if given.shape[1:] != (height, width, 3):
        raise ValueError(f"control pictures have shape {given.shape[1:]}, expected {(height, width, 3)}")
    images = torch.from_numpy(given).to(pipe.device).permute(0, 3, 1, 2).float()
    if control.network.reads_latents:
        vae = pipe.vae
        mean, std = pipe.backend.encode_images((images / 127.5 - 1).to(vae.dtype))
        if not is_finite(mean, std):
            mean, _ = encode_exactly(vae, images / 127.5 - 1)
        images = mean * vae.config.scaling_factor  # not sampled: a picture is to be shown as it is
    else:
        images = images / 255
    pictures = images.new_zeros(1, images.shape[1], frames, *images.shape[2:])
    mask = images.new_zeros(1, 1, frames, *images.shape[2:])
    pictures[0, :, at], mask[:, :, at] = images.transpose(0, 1), 1.0
    return pictures.to(pipe.unet.dtype), mask.to(pipe.unet.dtype)
