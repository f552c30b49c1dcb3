"""Stages 3 and 4: the text-to-video backbone and its text encoder, first on single frames, then on video.

python -m recipes.train_base frames --out build/small
python -m recipes.train_base video --out build/small
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from emt.train.objective import Objective
from emt.unet import MotionTransferUNet
from recipes.common import (
    Clips,
    Stage,
    Trainer,
    compiled,
    kernel_attention,
    leave,
    make_base,
    make_scheduler,
    rank,
    save_on_signals,
    save_weights,
    stage_parser,
    train,
    wait_for_ranks,
    with_noise,
)

DEFAULTS = {"frames": (4.2, 320, 1.0), "video": (8.2, 64, 2.0)}
"""Minutes, batch and timestep shift of each stage."""


@contextlib.contextmanager
def without_motion_modules(unet: MotionTransferUNet) -> Iterator[None]:
    """Within, the network is one of single frames; its motion modules cost nothing."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    kept = [block.motion_modules for block in blocks]
    for block in blocks:
        block.motion_modules = nn.ModuleList()
    yield
    for block, modules in zip(blocks, kept, strict=True):
        block.motion_modules = modules


def base_loss(
    unet: MotionTransferUNet,
    text: CLIPTextModel,
    objective: Objective,
    latents: Tensor,
    tokens: Tensor,
    noise: Tensor,
    timestep: Tensor,
    subject: Tensor | None = None,
) -> Tensor:
    """Denoising loss of clips, through the text encoder as well."""
    prediction = unet(objective.add_noise(latents, noise, timestep), timestep, text(tokens)[0])
    return objective.loss(prediction, latents, noise, timestep, subject)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the backbone on frames or on video; writes OUT/frames.safetensors or OUT/video.safetensors."""
    parser = stage_parser(main.__doc__, minutes=0, batch=0)
    parser.add_argument("stage", choices=tuple(DEFAULTS))
    parser.add_argument("--start", type=Path, help="model folder to go on from")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.set_defaults(minutes=None, batch=None)
    options = parser.parse_args(arguments)
    name = options.stage
    minutes, batch, shift = DEFAULTS[name]
    options.minutes = minutes if options.minutes is None else options.minutes
    options.batch = batch if options.batch is None else options.batch
    stage = Stage(name, options)

    clips = Clips.random(stage) if options.compile_only else Clips.load(stage.out, stage.device)
    start = stage.out / "frames.safetensors" if name == "video" and not options.compile_only else None
    unet, text = make_base(stage.sizes, options.start or start)
    unet.to(stage.device, stage.dtype, memory_format=torch.channels_last)
    text.to(stage.device, stage.dtype)
    objective = Objective.from_scheduler(make_scheduler(), stage.device)
    single = name == "frames"

    with without_motion_modules(unet) if single else kernel_attention(stage), compiled(stage, unet):
        trainer = Trainer(
            lambda **batch: base_loss(unet, text, objective, **batch),
            [([*unet.parameters(), *text.parameters()], options.rate)],
            graph=stage.graph,
        )

        def draw() -> dict[str, Tensor]:
            # Two frames of a clip share a caption: the network takes no fewer.
            frames = 2 if single else None
            batch = clips.draw(options.batch, stage.generator, drop=0.1, realistic=0.12, frames=frames)
            return with_noise(batch, objective, stage.generator, stage.dtype, shift)

        train(stage, trainer, draw, warmup=200)
    if options.compile_only:
        return
    if rank() == 0:
        save_weights(stage.out / f"{name}.safetensors", unet=unet.float().state_dict(), text=text.float().state_dict())
    wait_for_ranks()


if __name__ == "__main__":
    save_on_signals()
    main()
    leave()
