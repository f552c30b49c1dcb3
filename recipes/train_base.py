"""Stages 3 and 4: text-to-video backbone and text encoder, first on single frames, then on video with references.

python -m recipes.train_base frames --out build/small
python -m recipes.train_base video --out build/small
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel

from emt.temporal import MotionFeatures
from emt.train.objective import Objective
from emt.unet import MotionTransferUNet
from recipes.common import (
    MINUTES,
    REFERENCE_TIMESTEP,
    Clips,
    Stage,
    Trainer,
    add_adapter,
    compiled,
    kernel_attention,
    leave,
    make_base,
    make_scheduler,
    model_weights,
    rank,
    save_on_signals,
    save_weights,
    stage_parser,
    tokenize,
    train,
    wait_for_ranks,
    with_noise,
)
from recipes.text import make_tokenizer

DEFAULTS = {"frames": (320, 1.0), "video": (64, 2.0)}
"""Batch and timestep shift of each stage."""


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


class MotionReader(nn.Module):
    """Linear maps from what a reference pass keeps to how everything moves, for the backbone to learn to tell it.

    A small backbone that only denoises tells its adapter where things are, and not how they move: a linear map reads
    nothing of `Motions.displacements` from its features (recipes/README.md). The maps are thrown away after training.

    Args:
        unet: whose features are read.
    """

    UNIT = 32.0  # pixels

    def __init__(self, unet: MotionTransferUNet) -> None:
        super().__init__()
        widths = [module.temporal_transformer.proj_in.out_features for module in unet.fusion_modules().values()]
        # From each of a module's two features: displacement since frame 0, and since the frame before.
        self.maps = nn.ModuleList([nn.Linear(width, 4) for width in widths for _ in range(2)])

    def forward(self, features: MotionFeatures, displacement: Tensor, share: Tensor) -> Tensor:
        """How far the maps are off, a float32 scalar.

        Args:
            features: of noisy clips.
            displacement: (batch, frames, 2, height, width), pixels.
            share: (batch,) of each clip in the sum; what noise hides cannot be read.
        """
        steps = displacement.diff(dim=1, prepend=displacement[:, :1])
        # A step is some eighth of the way.
        exact = torch.cat([displacement, 8 * steps], 2).float() / self.UNIT
        losses = []
        for i, pair in enumerate(features.layers.values()):
            size = pair[0].shape[2:4]
            here = F.adaptive_avg_pool2d(exact.flatten(0, 1), size).unflatten(0, exact.shape[:2]).permute(0, 1, 3, 4, 2)
            for linear, feature in zip(self.maps[2 * i : 2 * i + 2], pair, strict=True):
                off = F.smooth_l1_loss(linear(feature).float(), here, beta=0.2, reduction="none")
                losses.append((off.mean((1, 2, 3, 4)) * share).mean())
        return torch.stack(losses).mean()


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


def video_loss(
    unet: MotionTransferUNet,
    text: CLIPTextModel,
    objective: Objective,
    reader: MotionReader,
    weight: float,
    *,
    latents: Tensor,
    tokens: Tensor,
    noise: Tensor,
    timestep: Tensor,
    subject: Tensor,
    displacement: Tensor,
    target: Tensor,
    target_tokens: Tensor,
    target_noise: Tensor,
    target_timestep: Tensor,
    target_subject: Tensor,
) -> Tensor:
    """Denoising loss of clips by the backbone, plus that of targets which move like the first of them.

    Gradients go through the references' features too: the backbone learns to tell what the adapter needs to know.

    Args:
        unet: with an adapter.
        text: encoder of the captions.
        objective: of the base.
        reader: of the features of all clips.
        weight: of its loss.
        latents: of clips, the first of them references: (batch, channels, frames, height, width).
        tokens: (batch, tokens), of the empty prompt for references.
        noise: of the clips.
        timestep: (batch,) of the clips.
        subject: extra weight on parts of the clips (`Objective.loss`).
        displacement: (batch, frames, 2, height, width), pixels.
        target: latents that move like the references, as many as there are: (pairs, …).
        target_tokens: their captions' tokens.
        target_noise: theirs.
        target_timestep: (pairs,) theirs.
        target_subject: extra weight on parts of them.

    Returns:
        A float32 scalar.
    """
    pairs = len(target)
    hidden, target_hidden = text(torch.cat([tokens, target_tokens]))[0].split([len(tokens), pairs])
    noisy = objective.add_noise(latents, noise, timestep)
    prediction, features = unet.denoise_with_features(noisy, timestep, hidden)
    own = objective.loss(prediction, latents, noise, timestep, subject)
    reading = reader(features, displacement, objective.signal[timestep].square())
    motion = MotionFeatures({path: (a[:pairs], b[:pairs]) for path, (a, b) in features.layers.items()})
    noisy = objective.add_noise(target, target_noise, target_timestep)
    moved = unet(noisy, target_timestep, target_hidden, motion)
    following = objective.loss(moved, target, target_noise, target_timestep, target_subject)
    return own + following + weight * reading


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the backbone on frames or on video; writes OUT/frames.safetensors or OUT/video.safetensors."""
    parser = stage_parser(main.__doc__, minutes=0, batch=0)
    parser.add_argument("stage", choices=tuple(DEFAULTS))
    parser.add_argument("--start", type=Path, help="model folder to go on from")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--reading", type=float, default=0.5, help="video: weight of telling how everything moves")
    parser.add_argument(
        "--references", type=float, default=0.5, help="video: share of clips that are references, each with a target"
    )
    parser.set_defaults(minutes=None, batch=None)
    options = parser.parse_args(arguments)
    name = options.stage
    batch, shift = DEFAULTS[name]
    options.minutes = MINUTES[name] if options.minutes is None else options.minutes
    options.batch = batch if options.batch is None else options.batch
    stage = Stage(name, options)

    clips = Clips.random(stage) if options.compile_only else Clips.load(stage.out, stage.device)
    start = stage.out / "frames.safetensors" if name == "video" and not options.compile_only else None
    unet, text = make_base(stage.sizes, options.start or start)
    names = set(unet.state_dict())
    single = name == "frames"
    if not single:
        unet = add_adapter(unet, stage.sizes)
        if options.start is not None:  # scalers start anew, which may have closed
            before = {key: value for key, value in model_weights(options.start).items() if ".scaler." not in key}
            unet.load_state_dict(unet.state_dict() | before)
        # Half open throughout: while features tell little yet, scalers that learn close those of the finer level.
        for key, parameter in unet.named_parameters():
            parameter.requires_grad_(".scaler." not in key)
    reader = MotionReader(unet).to(stage.device, stage.dtype)
    unet.to(stage.device, stage.dtype, memory_format=torch.channels_last)
    text.to(stage.device, stage.dtype)
    objective = Objective.from_scheduler(make_scheduler(), stage.device)
    empty = tokenize(make_tokenizer(), [""]).long().to(stage.device)
    references = 1 if single else max(round(options.references * options.batch), 1)

    def noisy(batch: dict[str, Tensor], shift: float = shift) -> dict[str, Tensor]:
        return with_noise(batch, objective, stage.generator, stage.dtype, shift)

    def draw_frames() -> dict[str, Tensor]:
        # Two frames of a clip share a caption: the network takes no fewer.
        return noisy(clips.draw(options.batch, stage.generator, drop=0.1, realistic=0.12, frames=2))

    def draw_videos() -> dict[str, Tensor]:
        pairs = noisy(clips.draw_pairs(references, stage.generator, drop=0.1, realistic=0.35), shift=3.0)
        alone = noisy(clips.draw(options.batch - references, stage.generator, drop=0.1, realistic=0.12))
        read = {
            "latents": pairs["reference"],
            "noise": pairs["reference_noise"],
            "tokens": empty.expand(references, -1),
            "timestep": torch.full_like(pairs["timestep"], REFERENCE_TIMESTEP),
            "subject": pairs["subject"],
            "displacement": pairs["displacement"],
        }
        target = {"target": pairs["latents"]}
        target |= {f"target_{key}": pairs[key] for key in ("tokens", "noise", "timestep", "subject")}
        return target | {key: torch.cat([read[key], alone[key]]) for key in read}

    def loss(**batch: Tensor) -> Tensor:
        if single:
            return base_loss(unet, text, objective, **batch)
        return video_loss(unet, text, objective, reader, options.reading, **batch)

    trained = [p for key, p in unet.named_parameters() if p.requires_grad and not (single and "motion_" in key)]
    groups = [([*trained, *text.parameters()], options.rate)]
    if not single:
        groups.append((list(reader.parameters()), 3 * options.rate))
    passes = ("forward",) if single else ("forward", "denoise_with_features")
    with without_motion_modules(unet) if single else kernel_attention(stage), compiled(stage, unet, *passes):
        trainer = Trainer(loss, groups, graph=stage.graph)
        train(stage, trainer, draw_frames if single else draw_videos, warmup=200)
    if options.compile_only:
        return
    if rank() == 0:
        weights = unet.float().state_dict()
        parts = {"unet": {key: value for key, value in weights.items() if key in names}}
        if not single:  # the next stage goes on from there
            parts["adapter"] = {key: value for key, value in weights.items() if key not in names}
        save_weights(stage.out / f"{name}.safetensors", **parts, text=text.float().state_dict())
    wait_for_ranks()


if __name__ == "__main__":
    save_on_signals()
    main()
    leave()
