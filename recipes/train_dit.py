"""The small diffusion transformer: its backbone on single frames and on video, and its adapter on the frozen backbone.

python -m recipes.train_dit frames --out build/dit
python -m recipes.train_dit video --out build/dit
python -m recipes.train_dit adapter --out build/dit
python -m recipes.train_dit adapter --out build/dit --name no-scaler --no-scaler          # ablations
python -m recipes.train_dit adapter --out build/dit --name early --blocks 0 1 2
python -m recipes.train_dit adapter --out build/dit --name same-frame --neighbours 0
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from emt import demo
from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.train.objective import FlowObjective
from recipes.distributed import average_over_ranks, leave, rank, say, wait_for_ranks
from recipes.dit import (
    REFERENCE_TIMESTEP,
    SMALL,
    TINY,
    SharedParts,
    adapter_loss,
    backbone_loss,
    make_reader,
    make_transformer,
    one_frame_of_each,
    packed,
)
from recipes.hints import MotionHints
from recipes.latents import Clips, tokenize, with_noise
from recipes.networks import save_weights
from recipes.optimizer import GraphTrainer
from recipes.stage import Stage, compiled_blocks, save_on_signals, stage_parser, train


class Defaults(NamedTuple):
    """Defaults of a stage."""

    minutes: float
    batch: int
    shift: float  # of timesteps towards noise
    rate: float
    hold: float  # share of the stage before the learning rate falls
    reading: float = 0.0  # weight of telling how everything moves
    references: float = 0.0  # share of clips that are as references are read
    told: float = 0.0  # share of the others that are told how they move
    before: str | None = None  # the stage that it goes on from


DEFAULTS = {
    "frames": Defaults(1.4, 1024, shift=1.5, rate=1e-3, hold=0.9),
    "video": Defaults(7.4, 192, shift=2.0, rate=1e-3, hold=0.5, reading=2.0, references=0.33, before="frames"),
    "adapter": Defaults(3.4, 128, shift=3.0, rate=1e-3, hold=0.4, reading=0.5, before="video"),
}

SEEN = 0.7
"""R² of displacements below which a backbone does not see how clips move."""
SEEN_BY = 0.3
"""Share of the video stage after which such a backbone is to see it, and is taught at `MORE_READING`."""
MORE_READING = 5.0
"""Weight of telling how everything moves for a backbone that does not see it."""


def weights_of(path: Path, prefix: str) -> dict[str, Tensor]:
    """Weights that were saved under a prefix, in float32."""
    return {k[len(prefix) + 1 :]: v.float() for k, v in load_file(path).items() if k.startswith(f"{prefix}.")}


def backbone_of(start: Path) -> dict[str, Tensor]:
    """Weights of the backbone in a model folder or a stage's result, in float32."""
    if not start.is_dir():
        return weights_of(start, "transformer")
    network = WanMotionTransferTransformer.from_pretrained(start / "unet").float()
    return {name: value for name, value in network.state_dict().items() if ".adapter." not in name}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the backbone or the adapter; writes OUT/<stage>.safetensors, or OUT/NAME.safetensors of an adapter."""
    parser = stage_parser(main.__doc__, minutes=0, batch=0)
    parser.add_argument("stage", choices=tuple(DEFAULTS))
    parser.add_argument(
        "--parts", type=Path, default=demo.path(), help="model folder with the autoencoder and text encoder"
    )
    parser.add_argument(
        "--start-from", type=Path, help="model folder, or a stage's result, to go on from in place of the one before"
    )
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--hold", type=float, help="share of the stage before the learning rate falls")
    parser.add_argument("--reading", type=float, help="video and adapter: weight of telling how everything moves")
    parser.add_argument("--references", type=float, help="video: share of clips that are as references are read")
    parser.add_argument("--told", type=float, help="video: share of the others that are told how they move")
    parser.add_argument(
        "--taught",
        type=float,
        default=0.0,
        help="adapter: share of what the backbone predicts, told the truth, in what is learnt; 0 for the clips alone",
    )
    parser.add_argument(
        "--muon", action="store_true", help="adapter: its matrices take Muon's steps, as a backbone's do"
    )
    parser.add_argument("--save-minutes", type=float, default=1.0, help="how often to keep what there is so far")
    parser.add_argument("--name", default="adapter", help="adapter: of the result")
    parser.add_argument("--blocks", type=int, nargs="+", help="adapter: blocks that take the reference")
    parser.add_argument(
        "--neighbours", type=int, help="adapter: reference frames on either side that a frame sees (all)"
    )
    parser.add_argument("--no-scaler", action="store_true", help="adapter, ablation: every reference token counts 1")
    parser.add_argument(
        "--reference-timestep", type=int, default=REFERENCE_TIMESTEP, help="noise level at which references are read"
    )
    parser.set_defaults(minutes=None, batch=None)
    o = parser.parse_args(arguments)
    for key, value in DEFAULTS[o.stage]._asdict().items():
        if getattr(o, key, None) is None:
            setattr(o, key, value)
    adapting = o.stage == "adapter"
    name = o.name if adapting else o.stage
    stage = Stage(name, o)
    sizes, parts = TINY if o.tiny else SMALL, SharedParts.load(o.parts)

    blocks = (o.blocks or sizes.blocks) if adapting else ()
    model = make_transformer(sizes, parts, blocks, stage.sizes.frames, o.neighbours)
    before = o.start_from or (stage.out / f"{o.before}.safetensors" if o.before else None)
    reader = make_reader(model, sizes.layers - min(blocks, default=0), stage.device, torch.float32)
    read_clips = max(round(o.references * o.batch), 1)
    told_clips = round(o.told * (o.batch - read_clips)) if o.stage == "video" else 0
    taught = o.taught if adapting else 0.0
    hints = MotionHints(model.scale_shift_table.shape[-1], stage.device) if told_clips or taught else None
    if before is not None and not o.compile_only:
        model.load_state_dict(model.state_dict() | backbone_of(before))
        if hints is not None and taught:
            hints.load_state_dict(hints.state_dict() | weights_of(before, "hints"))
        if o.stage == "video" and before.is_file() and o.start_from is not None:
            reader.load_state_dict(reader.state_dict() | weights_of(before, "reader"))
            if hints is not None:
                hints.load_state_dict(hints.state_dict() | weights_of(before, "hints"))
    model.to(stage.device, stage.dtype)
    reader.maps.to(stage.dtype)
    if hints is not None:
        hints.map.to(stage.dtype).requires_grad_(not taught)
    text = parts.text.to(stage.device, stage.dtype)
    if adapting:
        model.requires_grad_(False)
        for key, parameter in model.adapter_parameters():
            parameter.requires_grad_(not (o.no_scaler and ".scaler." in key))
            if o.no_scaler and key.endswith("scaler.out.bias"):
                torch.nn.init.zeros_(parameter)
    clips = Clips.random(stage.sizes, stage.device) if o.compile_only else Clips.load(stage.out, stage.device)
    objective = FlowObjective(stage.device)
    nothing = tokenize(parts.tokenizer, [""]).long().to(stage.device)
    with torch.no_grad():
        empty = text(nothing)[0].clone()

    def noisy(batch: dict[str, Tensor], shift: float = o.shift) -> dict[str, Tensor]:
        return with_noise(packed(batch, sizes.pack), objective, stage.generator, stage.dtype, shift)

    def draw_frames() -> dict[str, Tensor]:
        batch = packed(clips.draw(o.batch, stage.generator, drop=0.1, realistic=0.12), sizes.pack)
        batch = one_frame_of_each(batch, stage.generator)
        return with_noise(batch, objective, stage.generator, stage.dtype, o.shift)

    reading = torch.tensor(o.reading, device=stage.device)

    def measure() -> dict[str, float]:
        """R² of the readings. A backbone that is late to see how clips move is taught with more weight from here on."""
        numbers = reader.explained()
        seen = average_over_ranks(torch.tensor([numbers["r2_x"], numbers["r2_y"]])).min().item()
        if o.stage == "video" and reading < MORE_READING and stage.share(trainer.step_count) > SEEN_BY and seen < SEEN:
            reading.fill_(MORE_READING)
            say(f"[{name}] R² of displacements is {seen:.2f}: they are read at a weight of {MORE_READING}")
        return numbers | (hints.losses() if hints is not None else {})

    def draw_videos() -> dict[str, Tensor]:
        """Clips of which the first are as references are read, and the last are told how they move."""
        read = noisy(clips.draw(read_clips, stage.generator, drop=1.0, realistic=0.35))
        read["timestep"] = torch.full_like(read["timestep"], o.reference_timestep)
        plain = noisy(clips.draw(o.batch - read_clips - told_clips, stage.generator, drop=0.1, realistic=0.12))
        drawn = [read, plain]
        if told_clips:  # in noise that hides how they move, as the adapter has to tell it
            told = clips.draw(told_clips, stage.generator, drop=0.1, realistic=0.12)
            drawn.append(noisy(told, DEFAULTS["adapter"].shift))
        return {key: torch.cat([part[key] for part in drawn]) for key in read} | {"weight": reading}

    def draw_pairs() -> dict[str, Tensor]:
        references, targets = clips.draw_pairs(o.batch, stage.generator, drop=0.15, realistic=0.35)
        return noisy({"reference": references["latents"]} | {k: v for k, v in targets.items() if k != "upright"})

    def loss(tokens: Tensor, **batch: Tensor) -> Tensor:
        with torch.no_grad():
            captions = text(tokens)[0]
        if o.stage == "frames":
            seen = objective.add_noise(batch["latents"], batch["noise"], batch["timestep"])
            return objective.loss(model(seen, batch["timestep"], captions), **batch)
        if not adapting:
            first = sizes.blocks[0]
            which = {"read": read_clips, "told": told_clips, "hints": hints, "first": first}
            return backbone_loss(model, objective, reader, text=captions, **which, **batch)
        which = {"empty": empty, "reference_timestep": o.reference_timestep}
        teacher = {"hints": hints, "taught": taught, "first": sizes.blocks[0]}
        return adapter_loss(model, objective, reader, o.reading, text=captions, **which, **teacher, **batch)

    so_far, metadata = stage.out / f"{name}-so-far.safetensors", {"reference_timestep": str(o.reference_timestep)}

    def save(path: Path) -> None:
        """In half precision: what is trained, and the maps that the next run of the stage goes on with."""
        if adapting:
            options = {"reference_blocks": list(blocks), "reference_neighbours": o.neighbours, **metadata}
            facts = {"options": json.dumps(options), "steps": str(trainer.step_count)}
            save_weights(path, facts, adapter={key: p.half() for key, p in model.adapter_parameters()})
            return
        state = {key: value.half() for key, value in model.state_dict().items()}
        maps = {"reader": reader} | ({"hints": hints} if hints is not None else {})
        kept = {name: {k: v.half() for k, v in part.state_dict().items()} for name, part in maps.items()}
        save_weights(path, metadata, transformer=state, **kept)

    with_muon = o.muon or not adapting
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and p.requires_grad] if with_muon else []
    apart = {id(p) for p in matrices}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    maps = [] if o.stage == "frames" else [*reader.parameters()]
    maps += [] if hints is None or taught else [*hints.parameters()]
    groups = [(trained, o.rate)] + ([(maps, 3 * o.rate)] if maps else [])
    draw = {"frames": draw_frames, "video": draw_videos, "adapter": draw_pairs}[o.stage]
    with compiled_blocks(stage, model.blocks):
        trainer = GraphTrainer(loss, groups, matrices=[(matrices, o.rate)], graph=stage.graph)
        found = None if o.stage == "frames" else measure
        train(stage, trainer, draw, warmup=200, hold=o.hold, measure=found, save=lambda: save(so_far))
    if o.compile_only:
        return
    if rank() == 0:
        save(stage.out / f"{name}.safetensors")
        so_far.unlink(missing_ok=True)
    wait_for_ranks()


if __name__ == "__main__":
    save_on_signals()
    main()
    leave()
