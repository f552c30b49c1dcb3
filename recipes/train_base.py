"""Stages 3 to 5: backbone and text encoder on single frames, on how clips move, and on video with references.

python -m recipes.train_base frames --out build/small
python -m recipes.train_base motion --out build/small
python -m recipes.train_base video --out build/small
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from emt.backbones.sd15.motion_module import MotionModule
from emt.backbones.sd15.unet import MotionTransferUNet
from emt.features import MotionFeatures
from emt.train.objective import Objective
from recipes.distributed import leave, rank, wait_for_ranks
from recipes.latents import Clips, tokenize, with_noise
from recipes.networks import (
    REFERENCE_TIMESTEP,
    adapter_metadata,
    add_adapter,
    make_base,
    make_scheduler,
    network_weights,
    save_weights,
)
from recipes.optimizer import GraphTrainer
from recipes.reader import MotionReader
from recipes.stage import MINUTES, Stage, compiled, kernel_attention, save_on_signals, stage_parser, train
from recipes.text import make_tokenizer


class Defaults(NamedTuple):
    """Default options of a stage."""

    batch: int
    shift: float  # of timesteps towards noise
    rate: float
    reading: float = 0.0  # weight of telling how everything moves
    references: float = 0.0  # share of clips that are read as references


DEFAULTS = {
    "frames": Defaults(320, shift=1.0, rate=1e-3),
    "motion": Defaults(32, shift=2.0, rate=2e-3, reading=5.0, references=0.5),
    "video": Defaults(40, shift=2.0, rate=7e-4, reading=1.0, references=0.8),
}


@contextlib.contextmanager
def without_motion_modules(unet: MotionTransferUNet) -> Iterator[None]:
    """Context manager: run the network on single frames, without its motion modules."""
    blocks = unet.blocks()
    kept = [block.motion_modules for block in blocks]
    for block in blocks:
        block.motion_modules = nn.ModuleList()
    yield
    for block, modules in zip(blocks, kept, strict=True):
        block.motion_modules = modules


def reader_of(
    modules: Iterable[MotionModule], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MotionReader:
    """Maps that read what motion modules pass on."""
    return MotionReader([module.temporal_transformer.proj_out.out_features for module in modules], device, dtype)


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


def motion_loss(
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
    **truth: Tensor,
) -> tuple[Tensor, MotionFeatures]:
    """Denoising loss of clips by the backbone, plus that of telling how everything in them moves.

    Args:
        unet: the network.
        text: encoder of the captions.
        objective: of the base.
        reader: of the hidden states.
        weight: of its loss.
        latents: (batch, channels, frames, height, width).
        tokens: (batch, tokens), of the empty prompt for references.
        noise: as `latents`.
        timestep: (batch,).
        subject: extra weight on parts of the clips (`Objective.loss`).
        truth: of the clips (`Clips.truth`).

    Returns:
        A float32 scalar, and the features that an adapter reads.
    """
    noisy = objective.add_noise(latents, noise, timestep)
    prediction, features, hidden = unet.denoise_with_hidden_states(noisy, timestep, text(tokens)[0])
    own = objective.loss(prediction, latents, noise, timestep, subject)
    reading = reader(hidden.values(), share=objective.signal_variance(timestep), **truth)
    return own + weight * reading, features


def video_loss(
    unet: MotionTransferUNet,
    text: CLIPTextModel,
    objective: Objective,
    readers: tuple[MotionReader, MotionReader],
    weight: float,
    references: int,
    *,
    target: Tensor,
    target_tokens: Tensor,
    target_noise: Tensor,
    target_timestep: Tensor,
    target_subject: Tensor,
    **clips: Tensor,
) -> Tensor:
    """`motion_loss` of clips, plus the like of targets which move as the first of them do.

    Gradients go through the references' features too: the backbone learns to encode what the adapter needs.
    Of a target everything can be read at any noise level, since its reference shows it.

    Args:
        unet: with an adapter.
        text: encoder of the captions.
        objective: of the base.
        readers: of the hidden states of all clips, and of those of targets in the modules that take a reference.
        weight: of their losses.
        references: how many of the clips, from the first, have targets.
        target: latents, of which number i moves like reference i mod `references`.
        target_tokens: their captions' tokens.
        target_noise: theirs.
        target_timestep: theirs.
        target_subject: extra weight on parts of them.
        clips: what `motion_loss` takes.

    Returns:
        A float32 scalar.
    """
    alone, features = motion_loss(unet, text, objective, readers[0], weight, **clips)
    motion = MotionFeatures({path: (a[:references], b[:references]) for path, (a, b) in features.layers.items()})
    noisy = objective.add_noise(target, target_noise, target_timestep)
    moved, hidden = unet.move_with_hidden_states(noisy, target_timestep, text(target_tokens)[0], motion)
    times = len(target) // references
    displacement, pose = (clips[name][:references].repeat(times, 1, 1, 1, 1) for name in ("displacement", "pose"))
    all_of_them = torch.ones_like(target_timestep, dtype=torch.float32)
    states = [hidden[path] for path in unet.fusion_modules()]
    reading = readers[1](states, displacement, pose, all_of_them, all_of_them)
    own = objective.loss(moved, target, target_noise, target_timestep, target_subject)
    return alone + own + weight * reading


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the backbone on frames, on how clips move, or on video; writes OUT/<stage>.safetensors."""
    parser = stage_parser(main.__doc__, minutes=0, batch=0)
    parser.add_argument("stage", choices=tuple(DEFAULTS))
    parser.add_argument("--start-from", type=Path, help="model folder, or a stage's result, to go on from")
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--reading", type=float, help="motion and video: weight of telling how everything moves")
    parser.add_argument("--references", type=float, help="motion and video: share of clips that are read as references")
    parser.add_argument(
        "--save-minutes", type=float, default=4.0, help="motion and video: how often to keep what there is so far"
    )
    parser.add_argument(
        "--realistic", type=float, default=0.35, help="video: share of references that look like real footage"
    )
    parser.add_argument("--targets", type=int, default=2, help="video: clips that follow each reference")
    parser.add_argument(
        "--keep-scalers", action="store_true", help="video: those of --start-from, for a training that is short"
    )
    parser.add_argument("--average", type=float, default=0.999, help="decay of the average of the weights")
    parser.set_defaults(minutes=None, batch=None)
    options = parser.parse_args(arguments)
    name = options.stage
    for key, value in {"minutes": MINUTES[name], **DEFAULTS[name]._asdict()}.items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    stage = Stage(name, options)

    clips = Clips.random(stage.sizes, stage.device) if options.compile_only else Clips.load(stage.out, stage.device)
    before = {"motion": "frames", "video": "motion"}.get(name)
    start = stage.out / f"{before}.safetensors" if before is not None and not options.compile_only else None
    unet, text = make_base(stage.sizes, options.start_from or start)
    names = set(unet.state_dict())
    if name == "video":
        unet = add_adapter(unet, stage.sizes)
        if options.start_from is not None:  # scalers start anew, which may have closed
            learnt = network_weights(options.start_from)
            kept = {key: value for key, value in learnt.items() if options.keep_scalers or ".scaler." not in key}
            unet.load_state_dict(unet.state_dict() | kept)
        # As they are throughout: while features say little yet, scalers that learn close those of the finer level.
        for key, parameter in unet.named_parameters():
            parameter.requires_grad_(".scaler." not in key)
    unet.to(stage.device, stage.dtype, memory_format=torch.channels_last)
    text.to(stage.device, stage.dtype)
    reader, reader_of_targets = (
        reader_of(modules.values(), stage.device, stage.dtype)
        for modules in (unet.motion_modules(), unet.fusion_modules())
    )
    objective = Objective.from_scheduler(make_scheduler(), stage.device)
    empty = tokenize(make_tokenizer(), [""]).long().to(stage.device)
    references = max(round(options.references * options.batch), 1)

    def noisy(batch: dict[str, Tensor], shift: float = options.shift) -> dict[str, Tensor]:
        return with_noise(batch, objective, stage.generator, stage.dtype, shift)

    def draw_frames() -> dict[str, Tensor]:
        # Two frames of a clip share a caption: the network takes no fewer.
        return noisy(clips.draw(options.batch, stage.generator, drop=0.1, realistic=0.12, frames=2))

    def with_others(read: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clips read as references are, and the rest of the batch."""
        level = torch.full_like(read["timestep"], REFERENCE_TIMESTEP)
        read = read | {"tokens": empty.expand(references, -1), "timestep": level}
        others = noisy(clips.draw(options.batch - references, stage.generator, drop=0.1, realistic=0.12))
        return {key: torch.cat([part, others[key]]) for key, part in read.items()}

    def draw_motions() -> dict[str, Tensor]:
        return with_others(noisy(clips.draw(references, stage.generator, drop=1.0, realistic=0.5)))

    def draw_videos() -> dict[str, Tensor]:
        read, moved = clips.draw_pairs(
            references, stage.generator, drop=0.1, realistic=options.realistic, targets=options.targets
        )
        moved = noisy(moved)
        target = {f"target_{key}": moved[key] for key in ("tokens", "noise", "timestep", "subject")}
        read["subject"] = moved["subject"][:references]
        return target | {"target": moved["latents"]} | with_others(noisy(read))

    def loss(**batch: Tensor) -> Tensor:
        if name == "frames":
            return base_loss(unet, text, objective, **batch)
        if name == "motion":
            return motion_loss(unet, text, objective, reader, options.reading, **batch)[0]
        return video_loss(unet, text, objective, (reader, reader_of_targets), options.reading, references, **batch)

    def measure() -> dict[str, float]:
        found = {} if frames else reader.explained()
        if name == "video":
            found |= {f"target_{key}": value for key, value in reader_of_targets.explained().items()}
        return found

    so_far = stage.out / f"{name}-so-far.safetensors"

    def save(path: Path) -> None:
        weights = {key: value.float() for key, value in unet.state_dict().items()}
        parts = {"unet": {key: value for key, value in weights.items() if key in names}}
        if name == "video":  # the next stage goes on from there
            parts["adapter"] = {key: value for key, value in weights.items() if key not in names}
        parts["text"] = {key: value.float() for key, value in text.state_dict().items()}
        # An adapter's result, too: `assemble --adapter video` makes a model of it as it is.
        save_weights(path, adapter_metadata(trainer.step_count) if name == "video" else None, **parts)

    frames = name == "frames"
    trained = [p for key, p in unet.named_parameters() if p.requires_grad and not (frames and "motion_" in key)]
    groups = [([*trained, *text.parameters()], options.rate)]
    if not frames:
        # Without an adapter the second has nothing to read, and no maps.
        groups.append(([*reader.parameters(), *reader_of_targets.parameters()], 3 * options.rate))
    passes = {
        "frames": ["forward"],
        "motion": ["denoise_with_hidden_states"],
        "video": ["denoise_with_hidden_states", "move_with_hidden_states"],
    }
    draw = {"frames": draw_frames, "motion": draw_motions, "video": draw_videos}[name]
    with without_motion_modules(unet) if frames else kernel_attention(stage), compiled(stage, unet, *passes[name]):
        trainer = GraphTrainer(loss, groups, average=options.average, graph=stage.graph)
        # Without motion modules there is no whole network to save.
        train(stage, trainer, draw, warmup=200, measure=measure, save=None if frames else lambda: save(so_far))
    if options.compile_only:
        return
    if rank() == 0:
        save(stage.out / f"{name}.safetensors")
        so_far.unlink(missing_ok=True)
    wait_for_ranks()


if __name__ == "__main__":
    save_on_signals()
    main()
    leave()
