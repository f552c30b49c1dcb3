"""Stage 2: latents of rendered clips, each motion in several appearances, with the tokens of their captions.

python -m recipes.render_latents --out build/small
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recipes.distributed import average_over_ranks, leave, rank, ranks, wait_for_ranks
from recipes.latents import cover, latents_path, tokenize
from recipes.networks import load_vae, save_weights
from recipes.stage import MINUTES, Stage, save_on_signals, stage_parser
from recipes.text import make_tokenizer


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Render and encode until there are MOTIONS or the time is over; writes OUT/latents.safetensors.

    Each of several processes renders its own, and writes OUT/latents-RANK.safetensors.
    """
    parser = stage_parser(main.__doc__, minutes=MINUTES["latents"], batch=96)
    parser.add_argument("--motions", type=int, default=42_000)
    parser.add_argument("--appearances", type=int, default=4, help="of each motion; the last one is realistic")
    parser.add_argument("--camera", type=float, default=0.75, help="share of motions with a moving camera")
    parser.add_argument("--two-subjects", type=float, default=0.3, help="share of motions with two subjects")
    parser.add_argument("--turning", type=float, default=0.6, help="share of subjects that turn, whatever their path")
    parser.add_argument(
        "--swift",
        type=float,
        default=0.0,
        help="share of moving cameras that go as often far as near; 0 for a first model",
    )
    parser.add_argument(
        "--patterns", type=float, default=1.0, help="how many times as often as others a scene with a pattern is drawn"
    )
    stage = Stage("latents", parser.parse_args(arguments))
    o, world, generator = stage.options, stage.world, stage.generator
    tokenizer = make_tokenizer()
    vae = load_vae(stage.out)
    # Half precision keeps 11 bits of a latent, bfloat16 only 8.
    dtype = torch.float16 if stage.device.type == "cuda" else torch.float32
    vae = vae.to(stage.device, dtype, memory_format=torch.channels_last)

    def encode(clips: Tensor) -> Tensor:
        parts = []
        for frames in clips.flatten(0, 1).split(768):
            x = (frames.to(dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            parts.append(vae.encode(x).latent_dist.mean)
        return torch.cat(parts).unflatten(0, clips.shape[:2]).transpose(1, 2).half()

    side = stage.sizes.side // 8
    shape = (o.motions, o.appearances, vae.config.latent_channels, stage.sizes.frames, side, side)
    latents = torch.empty(shape, dtype=torch.float16, device=stage.device)
    subjects = torch.empty(o.motions, stage.sizes.frames, side, side, dtype=torch.uint8, device=stage.device)
    displacements, poses = (
        torch.empty(o.motions, stage.sizes.frames, numbers, side, side, dtype=torch.float16, device=stage.device)
        for numbers in (2, 4)
    )
    tokens = tokenize(tokenizer, [""])[0].repeat(o.motions, o.appearances, 1)
    done = 0
    while done < o.motions and (stage.share(done) < 1 or done == 0):
        n = min(o.batch, o.motions - done)
        rows = slice(done, done + n)
        motions = world.motions(
            n, generator, two_subjects=o.two_subjects, camera=o.camera, turning=o.turning, swift=o.swift
        )
        subjects[rows] = cover(motions, side)
        displacements[rows], poses[rows] = motions.displacements(side), motions.poses(side)
        for i in range(o.appearances):
            appearances = world.appearances(motions, generator, held_out=False, patterns=o.patterns)
            realistic = i == o.appearances - 1
            clips = world.render(motions, appearances, realism=float(realistic), generator=generator)
            latents[rows, i] = encode(clips)
            if not realistic:
                tokens[rows, i] = tokenize(tokenizer, world.captions(appearances, motions))
        done += n
        stage.log(done, clips_per_second=done * o.appearances / stage.elapsed())
    latents, tokens = latents[:done], tokens[:done]
    sample = latents[:: max(done // 256, 1)].float()
    if not sample.isfinite().all():
        raise FloatingPointError("the autoencoder's latents are not finite in half precision")
    # One factor for all; averaged before the first process writes it, as others may still read the autoencoder.
    measured = average_over_ranks(torch.tensor(1 / sample.std().item(), dtype=torch.float64)).item()
    if vae.config.scaling_factor == 1.0:
        vae.register_to_config(scaling_factor=measured)
        if rank() == 0:
            vae.save_config(stage.out / "vae")
    scaling = vae.config.scaling_factor
    latents *= scaling
    truth = {"subjects": subjects, "displacements": displacements, "poses": poses}
    truth = {name: value[:done].clone() for name, value in truth.items()}
    clips = {"latents": latents, "tokens": tokens.to(stage.device), **truth}
    save_weights(latents_path(stage.out, rank()), clips=clips)
    if rank() == 0:
        # Those of more processes, of another autoencoder perhaps, would be taken for its own by a later run.
        older = ranks()
        while latents_path(stage.out, older).exists():
            latents_path(stage.out, older).unlink()
            older += 1
    stage.log(done, force=True, motions=done, scaling=scaling)
    wait_for_ranks()


if __name__ == "__main__":
    save_on_signals()
    main()
    leave()
