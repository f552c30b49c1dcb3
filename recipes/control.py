"""A SparseCtrl network for a model: training on the model's own world, and a trial of what it does to the motion.

The network is frozen; a copy of its down and mid blocks learns to tell it what some frames are to show (Guo et al.
2023, arXiv 2311.16933). Clips are targets of the adapter's stage, moved by their references; half of them have no
caption, so that the pictures say what is seen.

    python -m recipes.render_latents --out build/control --minutes 0.6      # OUT/vae is the model's
    python -m recipes.control train --out build/control --model emt/demo --minutes 2
    python -m recipes.control trial --out build/control --model emt/demo
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from emt.backbones.sd15.sparse_control import SparseControl, open_control
from emt.control import Control
from emt.evaluate.truth import MEASURES, Truth, evaluate_truth
from emt.features import MotionFeatures
from emt.pipeline import MotionTransferPipeline
from recipes.distributed import leave, rank, wait_for_ranks
from recipes.evaluate_small import Cases, read_motions
from recipes.latents import Clips, with_noise
from recipes.networks import REFERENCE_TIMESTEP, make_world
from recipes.opening import Frozen, Measured, measuring_parser
from recipes.optimizer import GraphTrainer
from recipes.stage import Stage, kernel_attention, save_on_signals, stage_parser, train


def draw_mask(n: int, frames: int, generator: torch.Generator) -> Tensor:
    """Frames that are shown of n clips, (n, 1, frames, 1, 1): the first, the first and the last, or up to four."""
    r = torch.rand(n, 2 + frames, generator=generator, device=generator.device)
    few = r[:, 2:].argsort(1).argsort(1) < 1 + (4 * r[:, 1:2]).long()
    mask = torch.zeros(n, frames, dtype=torch.bool, device=generator.device)
    mask[:, 0] = True
    mask[:, -1] = r[:, 0] < 0.3
    return torch.where(r[:, :1] < 0.6, mask, few)[:, None, :, None, None].float()


def train_control(arguments: Sequence[str] | None = None) -> None:
    """Train the control network; writes OUT/control.safetensors, with its published names."""
    parser = stage_parser(train_control.__doc__, minutes=2.0, batch=48)
    parser.add_argument("--model", type=Path, required=True, help="model folder that it is for")
    parser.add_argument("--rate", type=float, default=7e-4, help="learning rate")
    parser.add_argument("--drop", type=float, default=0.5, help="share of clips without a caption")
    options = parser.parse_args(arguments)
    stage = Stage("control", options)

    clips = Clips.load(stage.out, stage.device)
    model = Frozen.open(stage, options.model)
    unet, encoder, empty, objective = model.unet, model.encoder, model.empty, model.objective
    control = SparseControl.of_network(unet.config)
    control.start_from(unet)
    control.to(stage.device, stage.dtype, memory_format=torch.channels_last)
    control.conv_in.weight.requires_grad_(False)  # it reads zeros

    def loss(
        tokens: Tensor,
        latents: Tensor,
        noise: Tensor,
        timestep: Tensor,
        subject: Tensor,
        mask: Tensor,
        reference: Tensor,
        reference_noise: Tensor,
    ) -> Tensor:
        with torch.no_grad():
            text = encoder(tokens)[0]
            level = torch.full_like(timestep, REFERENCE_TIMESTEP)
            read = objective.add_noise(reference, reference_noise, REFERENCE_TIMESTEP)
            motion: MotionFeatures = unet.encode_reference(read, level, empty.expand(len(latents), -1, -1))
        shown = mask.expand(-1, -1, -1, *latents.shape[3:])
        residuals = control(timestep, text, latents * mask, shown)
        noisy = objective.add_noise(latents, noise, timestep)
        prediction = unet(noisy, timestep, text, motion, control=residuals)
        return objective.loss(prediction, latents, noise, timestep, subject)

    def draw() -> dict[str, Tensor]:
        references, targets = clips.draw_pairs(options.batch, stage.generator, drop=options.drop, realistic=0.35)
        batch = {"reference": references["latents"]} | {k: targets[k] for k in ("latents", "tokens", "subject")}
        mask = draw_mask(options.batch, stage.sizes.frames, stage.generator)
        return with_noise(batch | {"mask": mask}, objective, stage.generator, stage.dtype, shift=3.0)

    trained = [parameter for parameter in control.parameters() if parameter.requires_grad]
    with kernel_attention(stage):
        trainer = GraphTrainer(loss, [(trained, options.rate)], average=0.998, graph=stage.graph)
        train(stage, trainer, draw)
    if rank() == 0:
        state = {name: tensor.detach().half().cpu().contiguous() for name, tensor in control.named_parameters()}
        save_file(state, stage.out / "control.safetensors", {"format": "pt", "steps": str(trainer.step_count)})
    wait_for_ranks()


TRIALS = ("as it is", "pictures", "no prompt", "no prompt, pictures", "pictures of another place", "two pictures")
"""Rows of the trial: with and without prompts, and with the first frame that is wanted, of its own clip or of one that
moves otherwise, or with the first and the last frame."""


@torch.no_grad()
def play(
    pipeline: MotionTransferPipeline,
    network: SparseControl,
    cases: Cases,
    others: Tensor,
    trial: str,
    scale: float,
    batch: int,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Clips of a row, (n, frames, 3, height, width) uint8, and the pictures of their first frames."""
    wanted = others if "another" in trial else cases.exact
    made: list[np.ndarray] = []
    for start in range(0, len(cases.captions), batch):
        part = slice(start, start + batch)
        motion = read_motions(pipeline, cases.references[part], 0)
        pictures = wanted[part].permute(0, 1, 3, 4, 2).contiguous().numpy()
        last = pictures.shape[1] - 1
        control = [
            Control(network, {0: clip[0], **({last: clip[last]} if "two" in trial else {})}, scale) for clip in pictures
        ]
        captions = [""] * len(control) if "no prompt" in trial else cases.captions[part]
        chosen = how | ({"guidance": 1.0} if "no prompt" in trial else {})
        given = control if "picture" in trial else None
        seeds = [start + i for i in range(len(control))]
        made += pipeline.generate(captions, motion, seed=seeds, control=given, **chosen)
    return torch.from_numpy(np.stack(made)).permute(0, 1, 4, 2, 3), wanted[:, 0]


def likeness(clips: Tensor, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio of clips' first frames and the pictures, in dB."""
    error = (clips[:, 0].float() - pictures.float()).square().mean((1, 2, 3)).clamp(min=1e-3)
    return float((10 * (255**2 / error).log10()).mean())


def format_trials(rows: Sequence[tuple[str, Truth, float]]) -> str:
    """The table as Markdown."""
    names = ("displacement", "position_error", "size", "rotation", "pan_x", "pan_y", "zoom", "roll")
    names += ("two_displacement", "subject", "colour", "scene")
    lines = [f"| | first frame, dB | {' | '.join(MEASURES[name] for name in names)} |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for trial, truth, decibels in rows:
        cells = [f"{truth[name].value:.3f}" for name in names]
        lines.append(f"| {trial} | {decibels:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def try_control(arguments: Sequence[str] | None = None) -> None:
    """Measure what the control network does on held-out truth; writes OUT/NAME.md and .json."""
    parser = measuring_parser(try_control.__doc__, "trial")
    parser.add_argument("--scale", type=float, default=1.0, help="of the control network")
    parser.add_argument("--steps", type=int, help="the model's default if not given")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    o = parser.parse_args(arguments)
    opened = Measured.open(o)
    pipeline, device = opened.pipeline, opened.device
    network = open_control(o.out / "control.safetensors", pipeline.unet.config, pipeline.unet.dtype).to(device)
    world = make_world(device, opened.sizes)
    cases = Cases.draw(world, o.clips, o.seed)
    generator = torch.Generator(device).manual_seed(5 + o.seed)
    elsewhere = world.motions(o.clips, generator, held_out=True, two_subjects=0.0, camera=0.5)
    others = world.render(elsewhere, cases.requested, generator=generator).cpu()
    rows: list[tuple[str, Truth, float]] = []
    for trial in o.trials:
        clips, pictures = play(pipeline, network, cases, others, trial, o.scale, o.batch, steps=o.steps)
        truth = evaluate_truth(opened.judge, clips, cases.motions, cases.requested, cases.worn)
        rows.append((trial, truth, likeness(clips, pictures)))
        opened.say(trial)
        numbers = {t: {"decibels": d, **{k: v.as_dict() for k, v in found.items()}} for t, found, d in rows}
        opened.write(format_trials(rows), numbers)
    print(format_trials(rows), flush=True)


if __name__ == "__main__":
    commands = {"train": train_control, "trial": try_control}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise SystemExit(f"usage: python -m recipes.control {'|'.join(commands)} --help")
    save_on_signals()
    commands[sys.argv[1]](sys.argv[2:])
    leave()
