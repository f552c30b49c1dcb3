"""The small diffusion transformer of Wan's kind: its sizes, and the losses of its backbone and of its adapter.

Autoencoder, text encoder and tokenizer are those of a model folder that is there, the demo model: only the transformer
is new. As in Wan, whose autoencoder makes one latent frame of four, a latent frame is of more than one frame: of two
neighbours, side by side in channels. A transformer that gets single frames does not learn to see what moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase

from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.backends.codec import pack
from emt.train.objective import FlowObjective
from recipes.hints import MotionHints
from recipes.reader import MotionReader

REFERENCE_TIMESTEP = 50
"""Noise level at which references are read, of 1000: σ = 0.05. The UNet's `recipes.networks` says why it is low."""


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of the transformer; what its latents and prompts are is the shared parts' matter."""

    heads: int = 4
    head_channels: int = 64
    inner: int = 768
    layers: int = 9
    rank: int = 32
    scaler: int = 64
    blocks: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)  # that take the reference
    pack: int = 2  # frames of a latent frame


SMALL = TransformerSizes()
"""8.9 million parameters, and 0.6 of the adapter."""
TINY = TransformerSizes(heads=2, head_channels=16, inner=48, layers=3, rank=4, scaler=8, blocks=(1, 2))
"""A toy with the same parts, to try the recipe on a CPU."""


@dataclass
class SharedParts:
    """Autoencoder, text encoder and tokenizer of a model folder; nothing of them is trained."""

    vae: AutoencoderKL
    text: CLIPTextModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> SharedParts:
        """Open the parts of a model folder, in float32."""
        return cls(
            AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).requires_grad_(False).eval(),
            CLIPTextModel.from_pretrained(folder / "text_encoder").float().requires_grad_(False).eval(),
            AutoTokenizer.from_pretrained(folder / "tokenizer"),
        )


def make_transformer(
    sizes: TransformerSizes,
    parts: SharedParts,
    blocks: Sequence[int],
    frames: int,
    neighbours: int | None = None,
) -> WanMotionTransferTransformer:
    """The network, predicting 0 so far; `blocks` () for the backbone alone, `frames` of a clip."""
    channels = parts.vae.config.latent_channels * sizes.pack
    model = WanMotionTransferTransformer(
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_channels,
        in_channels=channels,
        out_channels=channels,
        text_dim=parts.text.config.hidden_size,
        ffn_dim=sizes.inner,
        num_layers=sizes.layers,
        reference_blocks=list(blocks),
        reference_neighbours=neighbours,
        adapter_rank=sizes.rank,
        scaler_channels=sizes.scaler,
        max_frames=frames,
        frames_per_latent=sizes.pack,
        first_frames=sizes.pack,
    )
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    return model


def make_reader(
    model: WanMotionTransferTransformer, layers: int, device: torch.device | str, dtype: torch.dtype
) -> MotionReader:
    """Maps that read what so many blocks pass on."""
    return MotionReader([model.scale_shift_table.shape[-1]] * layers, device, dtype)


def packed(batch: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """A batch of clips as the transformer takes them, `frames` to a latent frame; of truths, those of its last one."""
    changed = {name: pack(batch[name], frames) for name in ("latents", "reference") if name in batch}
    channels = batch["latents"].shape[1]
    changed["subject"] = pack(batch["subject"], frames).repeat_interleave(channels, 1)
    changed |= {name: batch[name][:, frames - 1 :: frames] for name in ("displacement", "pose") if name in batch}
    return batch | changed


def one_frame_of_each(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Any latent frame of each packed clip, as a clip of its own: (n, channels, 1, height, width)."""
    latents = batch["latents"]
    rows = torch.arange(len(latents), device=latents.device)
    which = torch.randint(latents.shape[2], (len(latents),), generator=generator, device=latents.device)
    single = {name: batch[name][rows, :, which].unsqueeze(2) for name in ("latents", "subject")}
    return single | {"tokens": batch["tokens"]}


def as_images(hidden: Tensor) -> Tensor:
    """Hidden states (batch, frames, height, width, channels) as a reader takes them, (batch·frames, channels, …)."""
    return hidden.flatten(0, 1).permute(0, 3, 1, 2)


def backbone_loss(
    model: WanMotionTransferTransformer,
    objective: FlowObjective,
    reader: MotionReader,
    weight: float | Tensor,
    *,
    latents: Tensor,
    text: Tensor,
    noise: Tensor,
    timestep: Tensor,
    subject: Tensor,
    read: int = 0,
    told: int = 0,
    hints: MotionHints | None = None,
    first: int = 0,
    **truth: Tensor,
) -> Tensor:
    """Denoising loss of clips by the backbone, plus that of telling how everything in them moves.

    Args:
        model: the network; what references would be to it are clips at `REFERENCE_TIMESTEP` with the empty prompt.
        objective: of the flow.
        reader: of what every block passes on.
        weight: of its loss.
        read: first clips, which are as references are read. They are not denoised: what so little noise hides is
            hardly to be told from the rest, and sampling never comes there.
        told: last clips, which are told how they move. Of them nothing is read, and where subjects are counts the
            same at all noise levels (`known_places`).
        hints: that tell them; None where there are none.
        first: block before which they are told, the first that will take a reference, 1 or more.
        latents: (batch, channels, frames, height, width).
        text: encodings of the captions, (batch, tokens, width).
        noise: as `latents`.
        timestep: (batch,).
        subject: extra weight on parts of the clips (`Objective.loss`).
        truth: of the clips (`Clips.truth`).

    Returns:
        A float32 scalar.
    """
    noisy = objective.add_noise(latents, noise, timestep)
    share = objective.signal_variance(timestep)
    if hints is None:
        prediction, _, hidden = model.denoise_with_hidden_states(noisy, timestep, text)
        drawn = (x[read:] for x in (prediction, latents, noise, timestep, subject))
        denoising = objective.loss(*drawn)
    else:
        down, across = model.config.patch_size[1:]
        height, width = latents.shape[3] // down, latents.shape[4] // across
        with hints.told(model.blocks[first - 1], told, height, width, **truth):
            prediction, _, hidden = model.denoise_with_hidden_states(noisy, timestep, text)
        share = torch.cat([share[:-told], torch.zeros_like(share[-told:])])
        plain, last = slice(read, -told), slice(-told, None)

        def denoising_of(part: slice, weight: Tensor) -> Tensor:
            return objective.loss(*(x[part] for x in (prediction, latents, noise, timestep, weight)))

        without, with_hints = (
            denoising_of(plain, subject),
            denoising_of(last, known_places(objective, subject, timestep)),
        )
        hints.note(without, denoising_of(last, subject))
        n = len(latents) - read
        denoising = ((n - told) * without + told * with_hints) / n
    reading = reader(map(as_images, hidden.values()), share=share, **truth)
    return denoising + weight * reading


def known_places(objective: FlowObjective, subject: Tensor, timestep: Tensor) -> Tensor:
    """Extra weight of subjects whose places something tells, a hint or a reference: the same at all noise levels.

    `FlowObjective.loss` lowers it with the signal's variance, since elsewhere it would draw subjects to where the noise
    still hides what is there. This raises it again, up to σ = 0.9.
    """
    return subject / objective.signal_variance(timestep).clamp(min=0.01).view(-1, *[1] * (subject.ndim - 1))


def adapter_loss(
    model: WanMotionTransferTransformer,
    objective: FlowObjective,
    reader: MotionReader,
    weight: float,
    *,
    reference: Tensor,
    reference_noise: Tensor,
    reference_timestep: float,
    empty: Tensor,
    latents: Tensor,
    text: Tensor,
    noise: Tensor,
    timestep: Tensor,
    subject: Tensor,
    displacement: Tensor,
    pose: Tensor,
    hints: MotionHints | None = None,
    taught: float = 0.0,
    first: int = 0,
) -> Tensor:
    """Loss of denoising targets that move as their references do, plus that of telling how they move.

    The reference pass runs the frozen backbone, without gradients. Of a target everything can be read at any noise
    level, since its reference shows it.

    Args:
        model: the network, with its adapter.
        objective: of the flow.
        reader: of what the blocks from the first that takes a reference pass on.
        weight: of its loss.
        reference: latents, (batch, channels, frames, height, width).
        reference_noise: as `reference`.
        reference_timestep: noise level at which references are read.
        empty: encoding of the empty prompt, (1, tokens, width).
        latents: of the targets.
        text: encodings of their captions.
        noise: theirs.
        timestep: theirs, (batch,).
        subject: extra weight on parts of them.
        displacement: how they move (`Clips.truth`).
        pose: how their subjects are held.
        hints: of the backbone's training, which tell it the truth where the adapter has a reference; None without.
        taught: share of what the backbone predicts so in what the adapter learns to predict, beside the target itself:
            the mean of what may be drawn of a motion has less noise than one clip of it.
        first: block before which hints tell it, as of `backbone_loss`.

    Returns:
        A float32 scalar.
    """
    with torch.no_grad():
        level = torch.full_like(timestep, reference_timestep)
        read = objective.add_noise(reference, reference_noise, reference_timestep)
        motion = model.encode_reference(read, level, empty.expand(len(read), -1, -1))
    noisy = objective.add_noise(latents, noise, timestep)
    prediction, _, hidden = model.denoise_with_hidden_states(noisy, timestep, text, motion)
    states = [as_images(hidden[path]) for path in list(hidden)[-len(reader.maps) :]]
    all_of_them = torch.ones_like(timestep)
    reading = reader(states, displacement, pose, all_of_them, all_of_them)
    known = known_places(objective, subject, timestep)
    wanted = latents
    if hints is not None:
        down, across = model.config.patch_size[1:]
        height, width = latents.shape[3] // down, latents.shape[4] // across
        truth = {"displacement": displacement, "pose": pose, "upright": all_of_them}
        with torch.no_grad(), hints.told(model.blocks[first - 1], len(latents), height, width, **truth):
            told = model(noisy, timestep, text)
        # Latents whose velocity is that of the backbone's prediction, in part.
        wanted = torch.lerp(latents.float(), noise.float() - told.float(), taught)
    return objective.loss(prediction, wanted, noise, timestep, known) + weight * reading
