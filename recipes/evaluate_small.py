"""Stage 8: held-out truth of the model, in a table and a contact sheet.

python -m recipes.evaluate_small --out build/small
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emt.backends.codec import pack
from emt.contact_sheet import contact_sheet
from emt.evaluate.judge import Judge
from emt.evaluate.truth import Truth, draw_cases, evaluate_truth, format_truth
from emt.features import Motion
from emt.pipeline import MotionTransferPipeline
from emt.sampling import add_noise
from emt.synthetic.renderer import Appearances, Motions, World
from recipes.networks import SMALL, TINY, make_world

SHOWN = 32
"""Pairs in the contact sheet."""
FLOOR = "floor: renders"
"""The column of the judge's own errors: what it reads in renders that play the motion exactly."""


@torch.no_grad()
def read_motions(pipeline: MotionTransferPipeline, clips: Tensor, seed: int) -> Motion:
    """The motion of many references in one pass: `MotionTransferPipeline.extract_motion` over a batch.

    Args:
        pipeline: the model.
        clips: (n, frames, 3, height, width) uint8.
        seed: of the noise.

    Returns:
        A motion that holds n references: sample i of a batch of n follows reference i.
    """
    device, dtype, vae = pipeline.device, pipeline.unet.dtype, pipeline.vae
    generator = torch.Generator(device).manual_seed(seed)
    x = clips.to(device).flatten(0, 1).to(vae.dtype) / 127.5 - 1
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(256)]) * vae.config.scaling_factor
    latents = pack(latents.unflatten(0, clips.shape[:2]).transpose(1, 2), pipeline.codec.frames)
    noise = torch.randn(latents.shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
    timestep = torch.full((len(clips),), pipeline.config.reference_timestep, device=device)
    noisy = add_noise(pipeline.scheduler, latents.to(dtype), noise, timestep)
    empty = pipeline.encode_prompts([""]).expand(len(clips), -1, -1)
    features = pipeline.unet.encode_reference(noisy, timestep, empty)
    return Motion(features, clips.shape[1], *clips.shape[3:], seed=seed)


@torch.no_grad()
def play(
    pipeline: MotionTransferPipeline, references: Tensor | None, captions: list[str], seed: int, batch: int, **how: Any
) -> Tensor:
    """Generate a clip for each caption, following its reference if any: (n, frames, 3, height, width) uint8."""
    results: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        part = slice(start, start + batch)
        motion = read_motions(pipeline, references[part], seed) if references is not None else None
        noise = [seed * 100_003 + start + i for i in range(len(captions[part]))]
        results += pipeline.generate(captions[part], motion, seed=noise, **how)
    return torch.from_numpy(np.stack(results)).permute(0, 1, 4, 2, 3)


def frames_of(clips: Tensor) -> list[np.ndarray]:
    """Clips (n, frames, 3, height, width) uint8 as `emt.evaluate` takes them: each (frames, height, width, 3)."""
    return [clip.permute(0, 2, 3, 1).contiguous().numpy() for clip in clips]


@torch.no_grad()
def through_vae(pipeline: MotionTransferPipeline, clips: Tensor) -> Tensor:
    """Clips encoded and decoded: what a perfect backbone would give."""
    out = []
    for frames in clips.flatten(0, 1).split(256):
        x = frames.to(pipeline.device).to(pipeline.vae.dtype) / 127.5 - 1
        y = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mean).sample.float()
        out.append(((y + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).cpu())
    return torch.cat(out).unflatten(0, clips.shape[:2])


def joined(parts: Sequence[Any]) -> Any:
    """Batches of motions or appearances as one, on the CPU."""
    return type(parts[0])(**{f.name: torch.cat([getattr(p, f.name).cpu() for p in parts]) for f in fields(parts[0])})


@dataclass(frozen=True)
class Cases:
    """Held-out clips: n motions, prompted in one appearance and played by references in another."""

    motions: Motions
    requested: Appearances
    worn: Appearances  # by the references
    references: Tensor  # (n, frames, 3, height, width) uint8
    exact: Tensor  # what is requested, rendered
    captions: list[str]

    @classmethod
    def draw(cls, world: World, clips: int, seed: int, *, held_out: bool = True) -> Cases:
        """So many cases; `held_out` as for `draw_cases`."""
        generator = torch.Generator(world.device).manual_seed(1000 + seed)
        motions, requested, worn = draw_cases(world, clips, generator, held_out=held_out)
        exact = world.render(motions, requested, generator=generator).cpu()
        references = world.render(motions, worn, generator=generator).cpu()
        return cls(motions, requested, worn, references, exact, world.captions(requested, motions))


def evaluate(
    pipeline: MotionTransferPipeline,
    judge: Judge,
    world: World,
    *,
    clips: int,
    seeds: int,
    batch: int,
    held_out: bool = True,
    backbone: bool = True,
    **how: Any,
) -> tuple[dict[str, Truth], Image.Image]:
    """The columns of the table by name, and a contact sheet of the first clips."""
    cases = [Cases.draw(world, clips, seed, held_out=held_out) for seed in range(seeds)]
    names = ("motions", "requested", "worn")
    motions, requested, worn = (joined([getattr(case, name) for case in cases]) for name in names)
    exact = torch.cat([case.exact for case in cases])

    def measured(videos: Tensor) -> Truth:
        return evaluate_truth(judge, videos, motions, requested, worn)

    runs = list(enumerate(cases))
    adapted = torch.cat([play(pipeline, c.references, c.captions, seed, batch, **how) for seed, c in runs])
    columns = {"adapted": measured(adapted)}
    if backbone:
        alone = torch.cat([play(pipeline, None, c.captions, seed, batch, **how) for seed, c in runs])
        columns["without reference"] = measured(alone)
    columns["floor: through the VAE"] = measured(through_vae(pipeline, exact))
    columns[FLOOR] = measured(exact)
    some = min(SHOWN, clips)
    pairs = torch.stack([cases[0].references[:some], adapted[:some]], 1).permute(0, 1, 2, 4, 5, 3).numpy()
    blocks = list(zip(cases[0].captions[:some], pairs, strict=True))
    return columns, contact_sheet(blocks, columns=2, labels=("reference", "result"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure OUT/model on motions, families of motion and combinations that training never showed."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages' results")
    parser.add_argument("--model", type=Path, help="model folder, OUT/model by default")
    parser.add_argument("--judge", type=Path, help="OUT/judge.safetensors by default")
    parser.add_argument("--clips", type=int, default=256, help="references for each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, help="the model's default if not given")
    parser.add_argument("--guidance", type=float, help="the model's default if not given")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--familiar", action="store_true", help="families and combinations of training instead")
    parser.add_argument("--no-backbone", action="store_true", help="leave out the column without reference")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="truth", help="of the results: OUT/<name>.md, .json and .png")
    parser.add_argument("--tiny", action="store_true", help="the stages ran with --tiny")
    o = parser.parse_args(arguments)
    started = time.monotonic()
    device = torch.device(o.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = MotionTransferPipeline.from_pretrained(o.model or o.out / "model", dtype=dtype).to(device)
    judge = Judge.load(o.judge or o.out / "judge.safetensors", device)
    columns, sheet = evaluate(
        pipeline,
        judge,
        make_world(device, TINY if o.tiny else SMALL),
        clips=o.clips,
        seeds=o.seeds,
        batch=o.batch,
        held_out=not o.familiar,
        backbone=not o.no_backbone,
        steps=o.steps,
        guidance=o.guidance,
        scheduler=o.scheduler,
    )
    table = format_truth(columns, floor=FLOOR, targets=not o.familiar)
    print(table)
    (o.out / f"{o.name}.md").write_text(table + "\n")
    numbers = {name: {key: value.as_dict() for key, value in column.items()} for name, column in columns.items()}
    (o.out / f"{o.name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    sheet.save(o.out / f"{o.name}.png")
    print(f"evaluated in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
