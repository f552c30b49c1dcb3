"""Stage 1: the autoencoder, on frames of the rendered world and of its realistic clips.

python -m recipes.train_vae --out build/small
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from recipes.distributed import leave, rank, wait_for_ranks
from recipes.latents import SUBJECT_WEIGHT, cover
from recipes.networks import make_vae
from recipes.optimizer import GraphTrainer
from recipes.stage import MINUTES, Stage, save_on_signals, stage_parser, train

POOL = 6000
"""Clips rendered before training, of which a third look like real footage."""
CHUNK = 96


def vae_loss(vae: AutoencoderKL, frames: Tensor, subject: Tensor, noise: Tensor) -> Tensor:
    """L1, L1 of gradients (edges stay sharp), MSE (large errors go), and a light KL to a normal distribution.

    Args:
        vae: the autoencoder.
        frames: (n, 3, height, width) between -1 and 1.
        subject: (n, 1, height, width), extra weight where a subject is: most of a picture is scene, and the few
            channels of a latent would go to its textures.
        noise: of the sampled latents.
    """
    posterior = vae.encode(frames).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    frames = frames.float()
    error = decoded - frames
    weight = 1 + subject.float()
    edges = (weight[..., 1:] * error.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (weight * (error.abs() + 2 * error.square())).mean() + 0.5 * edges + 1e-3 * kl


def render_pool(stage: Stage, clips: int) -> tuple[Tensor, Tensor]:
    """Frames to train on and where their subjects are: (frames, 3 and 1, height, width) uint8 on the device."""
    world, generator, parts, covered = stage.world, stage.generator, [], []
    for start in range(0, clips, CHUNK):
        motions = world.motions(min(CHUNK, clips - start), generator)
        appearances = world.appearances(motions, generator, held_out=False)
        parts.append(world.render(motions, appearances, realism=1 / 3, generator=generator).flatten(0, 1))
        covered.append(cover(motions, stage.sizes.side).flatten(0, 1)[:, None])
    return torch.cat(parts), torch.cat(covered)


@torch.no_grad()
def psnr(vae: AutoencoderKL, frames: Tensor, subject: Tensor) -> tuple[float, float, float]:
    """Peak signal-to-noise ratio in decibels of frames (n, 3, height, width) uint8: mean, worst, and on subjects."""
    errors, on_subjects, covered = [], 0.0, 0.0
    for part, mask in zip(frames.split(64), subject.split(64), strict=True):
        x = part.to(vae.dtype) / 127.5 - 1
        decoded = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        error = (decoded - x).float().square().mean(1, keepdim=True) / 4
        errors.append(error.mean((1, 2, 3)))
        on_subjects += (error * mask).sum().item()
        covered += mask.sum().item()
    values = -10 * torch.cat(errors).clamp(min=1e-10).log() / math.log(10)
    return values.mean().item(), values.min().item(), -10 * math.log10(max(on_subjects / max(covered, 1), 1e-10))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the autoencoder; writes OUT/vae."""
    parser = stage_parser(main.__doc__, minutes=MINUTES["vae"], batch=96)
    parser.add_argument("--pool", type=int, default=POOL, help="clips rendered before training")
    stage = Stage("vae", parser.parse_args(arguments))
    batch, generator = stage.options.batch, stage.generator
    clips = 32 if stage.options.tiny else stage.options.pool
    pool, covered = render_pool(stage, clips)
    held_out = [part[::8] for part in render_pool(stage, max(clips // 48, 2))]
    stage.log(0, force=True, frames=len(pool))

    vae = make_vae(stage.sizes).to(stage.device, stage.dtype, memory_format=torch.channels_last)
    rate = 1.2e-3
    trainer = GraphTrainer(
        functools.partial(torch.compile(vae_loss) if stage.options.compile else vae_loss, vae),
        [(list(vae.parameters()), rate)],
        graph=stage.graph,
        betas=(0.9, 0.99),
        average=0.998,
    )
    side = stage.sizes.side // 8

    def draw() -> dict[str, Tensor]:
        index = torch.randint(len(pool), (batch,), generator=generator, device=stage.device)
        frames = pool[index].to(stage.dtype) / 127.5 - 1
        subject = SUBJECT_WEIGHT * covered[index].to(stage.dtype)
        mirrored = torch.rand(batch, 1, 1, 1, generator=generator, device=stage.device) < 0.5
        frames, subject = (torch.where(mirrored, x.flip(-1), x) for x in (frames, subject))
        noise = torch.randn(batch, stage.sizes.latents, side, side, generator=generator, device=stage.device)
        frames = frames.contiguous(memory_format=torch.channels_last)
        return {"frames": frames, "subject": subject, "noise": noise.to(stage.dtype)}

    train(stage, trainer, draw, hold=0.1)
    if rank() == 0:
        vae.float()
        mean, worst, subjects = psnr(vae, *held_out)
        stage.log(trainer.step_count, force=True, psnr=mean, psnr_worst=worst, psnr_subjects=subjects)
        vae.save_pretrained(stage.out / "vae")
    wait_for_ranks()


if __name__ == "__main__":
    save_on_signals()
    main()
    leave()
