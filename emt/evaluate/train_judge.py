"""Training of the judge (`emt.evaluate.judge`) on the rendered world, and a check of it on renders it has not seen.

python -m emt.evaluate.train_judge train --minutes 2 --device cuda judge.safetensors
python -m emt.evaluate.train_judge check judge.safetensors
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emt.errors import EmtError
from emt.evaluate.judge import (
    SIZE,
    STRIDE,
    USUAL_SIDE,
    Judge,
    JudgeVocabulary,
    cells_of,
    compose,
    decompose,
    frames_of,
)
from emt.synthetic.motions import shortest

if TYPE_CHECKING:
    from emt.synthetic.renderer import Appearances, Motions, World


def judge_loss(
    judge: Judge, frames: Tensor, motions: Motions, appearances: Appearances, generator: torch.Generator
) -> dict[str, Tensor]:
    """The terms of the training loss on short clips.

    Args:
        judge: The network, in training mode.
        frames: (n, frames, 3, 128, 128) in [0, 1].
        motions, appearances: Their truth.
        generator: Source of randomness, on the frames' device.
    """
    n, count = frames.shape[:2]
    maps = judge(frames.flatten(0, 1))
    cells = cells_of(frames.device)
    position = motions.position.flatten(0, 1)  # (n · frames, 2, 2)
    present = motions.scale.flatten(0, 1) > 0
    inside = present & ((position > 0) & (position < SIZE)).all(-1)
    distance = (cells[None, None] - position[:, :, None]).square().sum(-1)  # (n · frames, 2, cells)
    near = torch.exp(-distance / (2 * STRIDE**2)) * inside[..., None]
    closeness, nearest = near.max(1)
    # CenterNet's focal loss: cells next to a centre are punished less for claiming it.
    probability = maps.heat.sigmoid().clamp(1e-5, 1 - 1e-5)
    centre = (distance == distance.amin(-1, keepdim=True)).logical_and(inside[..., None]).any(1)
    hit = (1 - probability) ** 2 * -probability.log()
    miss = probability**2 * (1 - closeness) ** 4 * -(1 - probability).log()
    total = inside.sum().clamp(min=1)

    weight = torch.where(closeness > 0.3, closeness, 0.0)
    weight = weight / weight.sum()

    def nearest_of(values: Tensor) -> Tensor:  # (n · frames, 2) -> (n · frames, cells)
        return values.gather(1, nearest)

    def everywhere(values: Tensor) -> Tensor:  # (n, 2) -> (n · frames, 2)
        return values[:, None].expand(n, count, 2).flatten(0, 1)

    goal = torch.stack([nearest_of(position[..., i]) for i in range(2)], 1)
    offset = ((goal - cells.T) / STRIDE - maps.offset).abs().sum(1)
    size = (nearest_of(motions.scale.flatten(0, 1).clamp(min=1) / USUAL_SIDE).log() - maps.size).abs()
    # The crops are off by about as much as the peaks that they will be taken at.
    true_scale = motions.scale.flatten(0, 1).clamp(min=8)
    seen_at = position + 1.5 * torch.randn(position.shape, generator=generator, device=position.device)
    off = 0.1 * torch.randn(true_scale.shape, generator=generator, device=position.device)
    subject, colour, turn = judge.identify(frames.flatten(0, 1), seen_at, true_scale * off.exp())
    kind, paint = everywhere(appearances.subject), everywhere(appearances.colour)
    turn = turn.gather(2, kind[..., None, None].expand(*kind.shape, 1, 2))[:, :, 0]
    rotation = motions.rotation.flatten(0, 1)
    turned = (torch.stack([rotation.sin(), rotation.cos()], -1) - turn).square().sum(-1)

    def of_subjects(values: Tensor) -> Tensor:  # (n · frames, 2) -> mean over those inside
        return (values * inside).sum() / total

    terms = {
        "heat": torch.where(centre, hit, miss).sum() / total,
        "offset": (offset * weight).sum(),
        "size": (size * weight).sum() * 2,
        "turn": of_subjects(turned),
        "subject": of_subjects(F.cross_entropy(subject.transpose(1, 2), kind, reduction="none")),
        "colour": of_subjects(F.cross_entropy(colour.transpose(1, 2), paint, reduction="none")) * 0.5,
        "scene": F.cross_entropy(maps.scene, appearances.scene.repeat_interleave(count)) * 0.5,
    }
    if count > 1:
        a, b = (part.flatten() for part in decompose(motions.camera))
        found_a, found_b, flow = judge.camera_steps(
            frames_of(maps, n, count, slice(0, -1)), frames_of(maps, n, count, slice(1, None))
        )
        point = torch.view_as_complex(cells - SIZE / 2)
        moved = torch.view_as_real((a[:, None] - 1) * point + b[:, None])
        error = (moved - flow[..., :2]).abs().sum(-1) / STRIDE
        # Laplace likelihood: the network says where it can be trusted, and the fit weighs its cells by that.
        terms["flow"] = (error * torch.exp(-flow[..., 2]) + 2 * flow[..., 2]).mean() * 0.5
        reach = SIZE * 0.4
        terms["camera"] = ((found_b - b).abs() + reach * (found_a - a).abs()).clamp(max=20).mean() * 0.25
    return terms


def degrade(frames: Tensor, generator: torch.Generator, roundtrip: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Make rendered clips look as if a model had made them: soft, noisy, a little off in tone.

    Args:
        frames: (n, frames, 3, height, width) in [0, 1].
        generator: Source of randomness, on the frames' device.
        roundtrip: Encodes and decodes frames (n, 3, height, width) in [0, 1] by the model's VAE; applied to a quarter.
    """
    n, count = frames.shape[:2]
    flat = frames.flatten(0, 1)
    device = frames.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    if roundtrip is not None:
        part = max(1, n // 4) * count
        flat = torch.cat([roundtrip(flat[:part]), flat[part:]])
    height, width = flat.shape[-2:]
    soft = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), "replicate"), 3, 1)
    low = F.interpolate(F.avg_pool2d(flat, 2), (height, width), mode="bilinear")
    mix = draw(n, 3, 1, 1, 1).repeat_interleave(count, 0)
    mix = torch.where(mix < 0.4, 0.0, mix)
    flat = flat + mix[:, 0] * 0.9 * (soft - flat)
    flat = flat + mix[:, 1] * 0.6 * (low - flat)
    gain = 1 + (draw(n, 3, 1, 1) - 0.5).repeat_interleave(count, 0) * 0.16
    shift = (draw(n, 3, 1, 1) - 0.5).repeat_interleave(count, 0) * 0.08
    fine = torch.randn(flat.shape, generator=generator, device=device)
    coarse = torch.randn((*flat.shape[:2], height // 8, width // 8), generator=generator, device=device)
    coarse = F.interpolate(coarse, (height, width), mode="bilinear")
    flat = flat * gain + shift + mix[:, 2] * (0.03 * fine + 0.05 * coarse)
    return flat.clamp(0, 1).unflatten(0, (n, count))


def train_judge(
    world: World,
    minutes: float = 1.5,
    device: str | torch.device | None = None,
    *,
    windows: int = 128,
    length: int = 2,
    seed: int = 0,
    steps: int | None = None,
    roundtrip: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, float, dict[str, float]], None] | None = None,
) -> Judge:
    """Train a judge on the rendered world, held-out motions and combinations included: it measures, it is not measured.

    Args:
        world: What to render, on `device`.
        minutes: Time to train for; the learning rate falls over it.
        device: Where to train; by default where the world is.
        windows: Clips of a batch.
        length: Consecutive frames taken of each clip; at least 2.
        seed: Seed of everything drawn.
        steps: Stop after so many steps instead of `minutes`.
        roundtrip: See `degrade`.
        progress: Called every 20 steps with the step, the share of the training done and the mean terms of the loss.

    Returns:
        The judge, in evaluation mode.
    """
    device = torch.device(device) if device is not None else world.device
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    judge = Judge(JudgeVocabulary.of_world()).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    rate = 4e-3
    optimiser = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    # The world renders as many frames as it says; a window of a clip is rendered by a copy that says fewer.
    painter = copy.copy(world)
    painter.frames = length
    pool_size = max(64, 16 * windows)
    starts = random.Random(seed)
    begun = time.monotonic()
    step, kept = 0, []
    while True:
        share = step / steps if steps is not None else (time.monotonic() - begun) / (60 * minutes)
        if share >= 1:
            break
        if step % 24 == 0:
            held_out = step % 72 == 48
            pool = world.motions(pool_size, generator, held_out=held_out, two_subjects=0.35, camera=0.65)
        index = torch.randint(pool_size, (windows,), generator=generator, device=device)
        start = starts.randrange(world.frames - length + 1)
        motions = _window(pool[index], start, length)
        # The world keeps subjects nearly upright; what a model makes of them may not be.
        turned = torch.rand(windows, 1, 2, generator=generator, device=device)
        turned = torch.where(turned < 0.2, turned * (2 * math.pi / 0.2), 0.0)
        motions = replace(motions, rotation=motions.rotation + turned)
        appearances = world.appearances(motions, generator)
        frames = painter.render(motions, appearances).float() / 255
        frames = degrade(frames, generator, roundtrip)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 60) * 0.5 * (1 + math.cos(math.pi * share))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            terms = judge_loss(judge, frames, motions, appearances, generator)
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimiser.step()
        step += 1
        if progress is not None:
            kept.append({name: value.detach() for name, value in terms.items()})
            if step % 20 == 0:
                progress(step, share, {name: float(torch.stack([k[name] for k in kept]).mean()) for name in terms})
                kept.clear()
    judge.eval()
    judge.readable.copy_(rotation_readable(judge, world, generator))
    return judge


def rotation_readable(judge: Judge, world: World, generator: torch.Generator, clips: int = 8) -> Tensor:
    """Which subjects a judge reads the rotation of: (subjects,) 1 or 0.

    Those whose mean error on turned true renders is under 0.35 radians. It leaves out what looks alike under some
    rotation, without a list of such subjects to keep.
    """
    count = len(judge.vocabulary.subjects)
    painter = copy.copy(world)
    painter.frames = 2
    motions = _window(world.motions(count * clips, generator, two_subjects=0.0, camera=0.0), 0, 2)
    # Any angle, so that a symmetric subject cannot pass by being usually upright.
    turned = 2 * math.pi * torch.rand(count * clips, 1, 1, generator=generator, device=world.device)
    motions = replace(motions, rotation=turned.expand_as(motions.rotation))
    appearances = world.appearances(motions, generator)
    appearances.subject[:, 0] = torch.arange(count, device=world.device).repeat(clips)
    found = judge.observe(painter.render(motions, appearances, generator=generator), motions.subjects).rotation
    error = (found - motions.rotation.to(found.device))[..., 0]
    error = shortest(error).abs().mean(1)
    return (error.unflatten(0, (clips, count)).mean(0) < 0.35).float()


def _window(motions: Motions, start: int, length: int) -> Motions:
    """Some consecutive frames of motions, the camera relative to the first of them."""
    part = slice(start, start + length)
    camera = motions.camera[:, part]
    return replace(
        motions,
        position=motions.position[:, part],
        scale=motions.scale[:, part],
        rotation=motions.rotation[:, part],
        camera=compose(*decompose(camera)),
    )


def main(arguments: list[str] | None = None) -> None:
    """Train a judge, or check one against renders it has not seen."""
    parser = argparse.ArgumentParser(prog="python -m emt.evaluate.train_judge", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a judge on the rendered world")
    train.add_argument("output", type=Path)
    train.add_argument("--minutes", type=float, default=1.5)
    train.add_argument("--windows", type=int, default=128, help="clips of a batch")
    train.add_argument("--vae", help="folder of a VAE whose reconstructions it should read well")
    check = commands.add_parser("check", help="print the judge's own errors on fresh renders")
    check.add_argument("judge", type=Path)
    for command in (train, check):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--clips", type=int, default=256, help="clips to check on")
    options = parser.parse_args(arguments)

    from emt.evaluate.truth import format_truth, judge_floor
    from emt.synthetic.renderer import World

    world = World(device=options.device)
    if options.command == "train":
        judge = train_judge(
            world,
            options.minutes,
            windows=options.windows,
            seed=options.seed,
            roundtrip=_vae_roundtrip(options.vae, options.device) if options.vae else None,
            progress=_print_progress,
        )
        judge.save(options.output)
    else:
        judge = Judge.load(options.judge, options.device)
    print(format_truth(judge_floor(judge, world, options.clips, seed=options.seed + 1)))


def _print_progress(step: int, share: float, terms: dict[str, float]) -> None:
    print(f"{step:5d} {share:4.0%} " + " ".join(f"{name} {value:.3f}" for name, value in terms.items()), flush=True)


def _vae_roundtrip(folder: str, device: str) -> Callable[[Tensor], Tensor]:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder).to(device).eval()

    @torch.no_grad()
    @torch.autocast(torch.device(device).type, torch.bfloat16)
    def roundtrip(frames: Tensor) -> Tensor:
        return (vae.decode(vae.encode(frames * 2 - 1).latent_dist.sample()).sample.float() / 2 + 0.5).clamp(0, 1)

    return roundtrip


if __name__ == "__main__":
    try:
        main()
    except EmtError as problem:
        raise SystemExit(f"error: {problem}") from None
