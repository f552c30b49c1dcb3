"""Latents of rendered clips, and the batches that are drawn from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.synthetic.motions import Motions, discs
from emt.train.objective import FlowObjective, Objective
from recipes.distributed import rank
from recipes.networks import Sizes
from recipes.text import make_tokenizer


def cover(motions: Motions, side: int) -> Tensor:
    """Mask of the subjects: (n, frames, side, side) uint8, a disc around each as wide as its sprite."""
    return discs(motions.position, 0.5 * motions.scale, side).any(2).to(torch.uint8)


def latents_path(out: Path, rank: int) -> Path:
    """File of the latents that a process rendered."""
    return out / (f"latents-{rank}.safetensors" if rank else "latents.safetensors")


SUBJECT_WEIGHT = 3.0
"""Extra weight of the loss where a subject is: they are a tenth of the picture, and prompts describe mostly them."""


@dataclass
class Clips:
    """Latents of rendered clips on the device: the same motions in several appearances.

    Any two appearances of a motion are an exact pair. The last one is realistic: it has no caption.
    """

    latents: Tensor  # (motions, appearances, channels, frames, height, width) float16, scaled
    tokens: Tensor  # (motions, appearances, tokens) int32
    subjects: Tensor  # (motions, frames, height, width) uint8, 1 where a subject is
    displacements: Tensor  # (motions, frames, 2, height, width) float16, `Motions.displacements`
    poses: Tensor  # (motions, frames, 4, height, width) float16, `Motions.poses`

    @classmethod
    def load(cls, out: Path, device: torch.device) -> Clips:
        """File that `render_latents` wrote in this process, or in the first one if there were fewer."""
        path = latents_path(out, rank())
        if not path.exists():
            path = latents_path(out, 0)
        with safe_open(str(path), "pt", device=str(device)) as file:
            return cls(**{field.name: file.get_tensor(f"clips.{field.name}") for field in fields(cls)})

    @classmethod
    def random(cls, sizes: Sizes, device: torch.device) -> Clips:
        """Noise of the shape that sizes give, enough to compile a stage with."""
        side = sizes.side // 8
        latents = torch.randn(4, 4, sizes.latents, sizes.frames, side, side, device=device).half()
        tokens = tokenize(make_tokenizer(), [""]).to(device)
        subjects = torch.zeros(4, sizes.frames, side, side, dtype=torch.uint8, device=device)
        displacements, poses = (
            torch.zeros(4, sizes.frames, numbers, side, side, dtype=torch.float16, device=device) for numbers in (2, 4)
        )
        return cls(latents, tokens.expand(4, 4, -1), subjects, displacements, poses)

    def draw(
        self, n: int, generator: torch.Generator, *, drop: float, realistic: float, frames: int | None = None
    ) -> dict[str, Tensor]:
        """A batch of clips with tokens, the caption dropped with probability `drop` and where there is none.

        Whole clips come with their truth: `truth`.

        Args:
            n: clips.
            generator: on the device.
            drop: probability of the empty caption.
            realistic: probability of a realistic clip.
            frames: so many frames of each clip, any of them; None for all in order.
        """
        motion = self._index(len(self.latents), n, generator)
        rendered = self.latents.shape[1] - 1
        chance = torch.rand(n, generator=generator, device=generator.device)
        view = torch.where(chance < realistic, rendered, self._index(rendered, n, generator))
        if frames is None:
            latents, subjects = self.latents[motion, view], self.subjects[motion]
        else:
            which = self._index(self.latents.shape[3], n * frames, generator).view(n, frames)
            latents = self.latents[motion[:, None], view[:, None], :, which].transpose(1, 2)
            subjects = self.subjects[motion[:, None], which]
        batch = {
            "latents": latents,
            "tokens": self._captions(motion, view, generator, drop),
            "subject": SUBJECT_WEIGHT * subjects[:, None].float(),
        }
        return batch if frames else batch | self.truth(motion, view)

    def draw_pairs(
        self,
        n: int,
        generator: torch.Generator,
        *,
        drop: float,
        realistic: float,
        targets: int = 1,
        mismatched: float = 0.0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """References, and targets that play the same motions in other appearances.

        Args:
            n: references.
            generator: on the device.
            drop: probability of the empty caption.
            realistic: probability that the reference is the realistic clip of the motion.
            targets: of each reference; target i follows reference i mod n.
            mismatched: share of references that move otherwise, as among pairs that nothing has filtered.

        Returns:
            The n references with their truth, and the n · targets targets with their tokens, as from `draw`.
        """
        rendered = self.latents.shape[1] - 1
        motion = self._index(len(self.latents), n, generator)
        # No two clips of a motion are the same appearance.
        looks = torch.rand(n, rendered, generator=generator, device=generator.device).argsort(1)
        chance = torch.rand(2, n, generator=generator, device=generator.device)
        worn = torch.where(chance[0] < realistic, rendered, looks[:, -1])
        source = torch.where(chance[1] < mismatched, self._index(len(self.latents), n, generator), motion)
        references = {"latents": self.latents[source, worn], **self.truth(source, worn)}
        motion, requested = motion.repeat(targets), looks[:, :targets].T.flatten()
        return references, {
            "latents": self.latents[motion, requested],
            "tokens": self._captions(motion, requested, generator, drop),
            "subject": SUBJECT_WEIGHT * self.subjects[motion][:, None].float(),
            **self.truth(motion, requested),
        }

    def truth(self, motion: Tensor, view: Tensor) -> dict[str, Tensor]:
        """Motion of clips, for `MotionReader`: displacement, pose, and whether their subjects have an upright."""
        upright = (view < self.latents.shape[1] - 1).float()
        return {
            "displacement": self.displacements[motion].float(),
            "pose": self.poses[motion].float(),
            "upright": upright,
        }

    def _index(self, below: int, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(below, (n,), generator=generator, device=generator.device)

    def _captions(self, motion: Tensor, view: Tensor, generator: torch.Generator, drop: float) -> Tensor:
        dropped = torch.rand(len(motion), generator=generator, device=generator.device) < drop
        # The realistic clips' tokens are those of the empty prompt.
        empty = self.tokens[:1, -1]
        return torch.where(dropped[:, None], empty, self.tokens[motion, view]).long()


def with_noise(
    batch: dict[str, Tensor],
    objective: Objective | FlowObjective,
    generator: torch.Generator,
    dtype: torch.dtype,
    shift: float,
) -> dict[str, Tensor]:
    """Add timesteps and noise to a batch, latents in the dtype of the network."""
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    latents = batch["latents"]
    for name in ("noise", "reference_noise") if "reference" in batch else ("noise",):
        batch[name] = torch.randn(latents.shape, generator=generator, device=latents.device)
    return batch | {"timestep": objective.sample_timesteps(len(latents), generator, shift)}


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Tensor:
    """(prompts, tokens) int32, padded to the tokenizer's length."""
    length = tokenizer.model_max_length
    found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.input_ids.int()
