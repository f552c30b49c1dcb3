"""Stage 6: the adapter, as in EfficientMT: temporal q/k/v and scalers of the up blocks, on exact pairs.

python -m recipes.train_adapter --out build/small
python -m recipes.train_adapter --out build/small --name no-scaler --no-scaler           # ablations
python -m recipes.train_adapter --out build/small --name up-block-1 --fusion-blocks 1
python -m recipes.train_adapter --out build/small --name unfiltered --mismatched 0.3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emt.backbones.sd15.unet import MotionTransferUNet
from emt.train.objective import Objective, adapter_loss
from recipes.distributed import leave, rank, wait_for_ranks
from recipes.latents import Clips, tokenize, with_noise
from recipes.networks import (
    REFERENCE_TIMESTEP,
    adapter_metadata,
    add_adapter,
    load_weights,
    make_base,
    make_scheduler,
    save_weights,
    set_scalers,
)
from recipes.optimizer import GraphTrainer
from recipes.stage import MINUTES, Stage, compiled, kernel_attention, save_on_signals, stage_parser, train
from recipes.text import make_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the adapter; writes OUT/<name>.safetensors."""
    parser = stage_parser(main.__doc__, minutes=MINUTES["adapter"], batch=64)
    parser.add_argument("--name", default="adapter", help="of the result")
    parser.add_argument(
        "--from-backbone", action="store_true", help="start from the backbone's projections, not from the video stage's"
    )
    parser.add_argument("--rate", type=float, default=7e-4, help="learning rate of the projections")
    parser.add_argument("--scaler-rate", type=float, default=3e-5, help="learning rate of the scalers")
    parser.add_argument(
        "--reference-timestep", type=int, default=REFERENCE_TIMESTEP, help="noise level at which references are read"
    )
    parser.add_argument("--realistic", type=float, default=0.35, help="share of references that look like real footage")
    parser.add_argument("--fusion-blocks", type=int, nargs="+", help="up blocks that take the reference (all)")
    parser.add_argument("--no-scaler", action="store_true", help="ablation: the reference enters unscaled")
    parser.add_argument("--mismatched", type=float, default=0.0, help="ablation: share of pairs whose motions differ")
    options = parser.parse_args(arguments)
    stage = Stage(options.name, options)

    clips = Clips.random(stage.sizes, stage.device) if options.compile_only else Clips.load(stage.out, stage.device)
    before = None if options.compile_only else stage.out / "video.safetensors"
    base, text = make_base(stage.sizes, before)
    unet = add_adapter(base, stage.sizes, options.fusion_blocks)
    if before is not None and not options.from_backbone:
        names = {name for name, _ in unet.adapter_parameters()}
        learnt = load_weights(before, "adapter")
        unet.load_state_dict(unet.state_dict() | {name: learnt[name] for name in names})
    if options.no_scaler:
        set_scalers(unet, open_always=True)
    unet.requires_grad_(False).to(stage.device, stage.dtype, memory_format=torch.channels_last)
    trained = {name: p for name, p in unet.adapter_parameters() if not (options.no_scaler and ".scaler." in name)}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    scalers = [p for name, p in trained.items() if ".scaler." in name]
    projections = [p for name, p in trained.items() if ".scaler." not in name]

    text.requires_grad_(False).to(stage.device, stage.dtype).eval()
    with torch.no_grad():
        empty = text(tokenize(make_tokenizer(), [""]).long().to(stage.device))[0].clone()
    objective = Objective.from_scheduler(make_scheduler(), stage.device)

    def loss(latents: Tensor, reference: Tensor, tokens: Tensor, **others: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = text(tokens)[0]
        level = options.reference_timestep
        return adapter_loss(unet, objective, reference, latents, hidden, empty, reference_timestep=level, **others)

    def draw() -> dict[str, Tensor]:
        references, targets = clips.draw_pairs(
            options.batch, stage.generator, drop=0.1, realistic=options.realistic, mismatched=options.mismatched
        )
        batch = {"reference": references["latents"]} | {k: targets[k] for k in ("latents", "tokens", "subject")}
        return with_noise(batch, objective, stage.generator, stage.dtype, shift=3.0)

    groups = [(projections, options.rate)] + ([(scalers, options.scaler_rate)] if scalers else [])
    with kernel_attention(stage), compiled(stage, unet, "forward", "encode_reference"):
        trainer = GraphTrainer(loss, groups, average=0.998, graph=stage.graph)
        train(stage, trainer, draw)
    if options.compile_only:
        return
    if rank() == 0:
        state = {name: p.detach().float() for name, p in unet.adapter_parameters()}
        metadata = adapter_metadata(trainer.step_count, options.fusion_blocks, options.reference_timestep)
        save_weights(stage.out / f"{options.name}.safetensors", metadata, adapter=state)
        unet.float()
        text.float()
        empty, stage.dtype = empty.float(), torch.float32
        stage.log(trainer.step_count, force=True, **mean_scales(unet, loss, draw()))
    wait_for_ranks()


@torch.no_grad()
def mean_scales(unet: MotionTransferUNet, loss: Callable[..., Tensor], batch: dict[str, Tensor]) -> dict[str, float]:
    """Openness of each scaler on a batch: the mean of its scale map, by motion module."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for path, module in unet.fusion_modules().items():
        scales = found.setdefault(path.replace("_blocks", "").replace("motion_modules.", ""), [])
        scaler = module.temporal_transformer.transformer_blocks[0].scaler
        hooks.append(scaler.register_forward_hook(lambda _, __, scale, to=scales: to.append(scale.float().mean())))
    loss(**batch)
    for hook in hooks:
        hook.remove()
    return {f"scale_{path}": torch.stack(scales).mean().item() for path, scales in found.items()}


if __name__ == "__main__":
    save_on_signals()
    main()
    leave()
