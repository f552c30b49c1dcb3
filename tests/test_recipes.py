"""The recipes at toy sizes: every stage runs, its parts are what they claim, and the folder at the end loads."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributed import run as distributed_run
from transformers import AutoTokenizer
from two_processes import in_two_processes, train_half, trained

from emt.backbones.sd15.sparse_control import open_control
from emt.evaluate.judge import Judge, JudgeVocabulary
from emt.pipeline import MotionTransferPipeline
from emt.synthetic.renderer import SCENES, words
from emt.train.objective import Objective, adapter_loss, shift_timesteps
from emt.video import write_clip
from recipes import (
    ablations,
    assemble,
    control,
    distil,
    pans,
    real_clips,
    render_latents,
    samplers,
    train_adapter,
    train_all,
    train_base,
    train_vae,
)
from recipes.evaluate_small import evaluate, read_motions
from recipes.latents import SUBJECT_WEIGHT, Clips, cover, with_noise
from recipes.networks import (
    SMALL,
    TINY,
    load_weights,
    make_base,
    make_scheduler,
    make_unet,
    make_vae,
    make_world,
    set_scalers,
)
from recipes.optimizer import GraphTrainer, NonFiniteLoss, schedule
from recipes.reader import MotionReader
from recipes.stage import Stage, stage_parser, train
from recipes.text import make_text_encoder, make_tokenizer
from recipes.train_base import base_loss, motion_loss, reader_of, video_loss, without_motion_modules
from recipes.train_vae import vae_loss


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all stages, a few steps each."""
    folder = tmp_path_factory.mktemp("recipes")
    arguments = ["--out", str(folder), "--tiny", "--device", "cpu", "--steps", "3", "--batch", "8"]
    train_all.main([*arguments, "--judge-minutes", "0"])
    return folder


@pytest.fixture(scope="module")
def pipeline(out: Path) -> MotionTransferPipeline:
    loaded = MotionTransferPipeline.from_pretrained(out / "model", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


# -------------------------------------------------------------------------------------------------------- objective


def test_last_timestep_is_pure_noise() -> None:
    objective = Objective.from_scheduler(make_scheduler())
    latents, noise = torch.randn(2, 1, 4, 2, 4, 4)
    assert objective.signal[-1] == 0
    assert torch.equal(objective.add_noise(latents, noise, 999), noise)
    assert torch.allclose(objective.target(latents, noise, 999), -latents)


def test_velocity_and_noisy_latents_give_back_latents_and_noise() -> None:
    objective = Objective.from_scheduler(make_scheduler())
    latents, noise = torch.randn(2, 3, 4, 2, 4, 4)
    t = torch.tensor([10, 400, 900])
    noisy, velocity = objective.add_noise(latents, noise, t), objective.target(latents, noise, t)
    signal, sigma = (x[t].view(-1, 1, 1, 1, 1) for x in (objective.signal, objective.noise))
    assert torch.allclose(signal * noisy - sigma * velocity, latents, atol=1e-5)
    assert torch.allclose(sigma * noisy + signal * velocity, noise, atol=1e-5)


def test_noise_is_that_of_the_sampler() -> None:
    scheduler = make_scheduler()
    latents, noise = torch.randn(2, 2, 4, 2, 4, 4)
    t = torch.tensor([5, 700])
    ours = Objective.from_scheduler(scheduler).add_noise(latents, noise, t)
    assert torch.allclose(ours, scheduler.add_noise(latents, noise, t), atol=1e-5)


def test_epsilon_target_is_the_noise_and_other_types_are_refused() -> None:
    latents, noise = torch.randn(2, 1, 4, 2, 4, 4)
    assert torch.equal(Objective(torch.linspace(0.9, 0.1, 10)).target(latents, noise, 3), noise)
    with pytest.raises(ValueError, match="sample"):
        Objective(torch.ones(1), "sample")


def test_shift_moves_times_towards_noise() -> None:
    u = torch.linspace(0, 1, 11)
    assert torch.allclose(shift_timesteps(u, 1.0), u)
    shifted = shift_timesteps(u, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert shifted[5] == pytest.approx(0.75)


def test_timesteps_cover_the_schedule_evenly() -> None:
    objective = Objective.from_scheduler(make_scheduler())
    t = objective.sample_timesteps(100, torch.Generator().manual_seed(0))
    assert torch.equal(t.sort().values // 10, torch.arange(100))
    assert not torch.equal(t, t.sort().values)


# ------------------------------------------------------------------------------------------------------------- text


def test_tokenizer_knows_the_world_and_reloads(out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(out / "model" / "tokenizer")
    prompt = "A red cat, in the desert."
    ids = tokenizer(
        prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    assert ids.shape == (1, 16)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a red cat in the desert"
    assert (ids[0, 7:] == tokenizer.eos_token_id).all()
    assert tokenizer.unk_token_id not in tokenizer(" ".join(words())).input_ids
    assert tokenizer("zebra").input_ids[1] == tokenizer.unk_token_id
    configuration = json.loads((out / "model" / "tokenizer" / "tokenizer_config.json").read_text())
    assert configuration["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_text_encoder_pools_at_the_end_of_text() -> None:
    tokenizer, encoder = make_tokenizer(), make_text_encoder(32, 1).eval()
    ids = tokenizer(["a red cat"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    found = encoder(ids)
    assert torch.allclose(found.pooler_output[0], found.last_hidden_state[0, 4])


# ---------------------------------------------------------------------------------------------------------- trainer


def test_trainer_is_adamw_with_clipping() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(5, 3)
    theirs = copy.deepcopy(ours)
    batches = [{"x": torch.randn(7, 5)} for _ in range(6)]
    trainer = GraphTrainer(lambda x: ours(x).square().sum(), [([ours.weight], 1e-2), ([ours.bias], 1e-3)])
    groups = [{"params": [theirs.weight], "lr": 1e-2}, {"params": [theirs.bias], "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    for batch in batches:
        trainer.step(batch, 1.0)
        optimizer.zero_grad()
        theirs(batch["x"]).square().sum().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)
    assert torch.allclose(ours.bias, theirs.bias, atol=1e-6)
    trainer.use_average()
    assert not torch.equal(ours.weight, theirs.weight)
    assert torch.allclose(ours.weight, theirs.weight, atol=0.05)


def test_training_goes_on_from_its_own_weights_after_the_average_was_saved() -> None:
    def trained(look: bool) -> tuple[nn.Linear, list[torch.Tensor]]:
        torch.manual_seed(0)
        model, seen = nn.Linear(5, 3), []
        trainer = GraphTrainer(lambda x: model(x).square().sum(), [(list(model.parameters()), 1e-2)])
        for _ in range(4):
            trainer.step({"x": torch.ones(2, 5)}, 1.0)
            if look:
                with trainer.averaged_weights():
                    seen.append(model.weight.detach().clone())
        if not look:
            trainer.use_average()
            seen.append(model.weight.detach().clone())
        return model, seen

    (model, seen), (averaged, last) = trained(True), trained(False)
    assert torch.equal(seen[-1], last[0])
    assert not torch.equal(seen[0], seen[-1])
    assert not torch.equal(model.weight, averaged.weight)


def test_a_stage_keeps_what_there_is_so_far(tmp_path: Path) -> None:
    model, kept = nn.Linear(2, 2), []
    options = stage_parser(None, 1.0, 2).parse_args(["--out", str(tmp_path), "--device", "cpu", "--steps", "3"])
    options.save_minutes = 0.0
    stage = Stage("try", options)
    trainer = GraphTrainer(lambda x: model(x).square().sum(), [(list(model.parameters()), 1e-2)])
    train(stage, trainer, lambda: {"x": torch.ones(2, 2)}, save=lambda: kept.append(model.weight.detach().clone()))
    assert len(kept) == 3
    assert torch.equal(kept[-1], model.weight)


def test_a_step_that_is_not_finite_is_skipped_and_many_stop_the_training() -> None:
    model = nn.Linear(2, 2)
    trainer = GraphTrainer(lambda x: model(x).square().sum(), [(list(model.parameters()), 1e-2)])
    trainer.step({"x": torch.full((1, 2), float("nan"))}, 1.0)
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(NonFiniteLoss):
        trainer.read()
    for _ in range(3):
        trainer.step({"x": torch.ones(1, 2)}, 1.0)
    trainer.step({"x": torch.full((1, 2), float("inf"))}, 1.0)
    assert trainer.read()["skipped"] == 1


def test_learning_rate_rises_holds_and_falls() -> None:
    assert schedule(0, 0.0, warmup=100) == pytest.approx(0.01)
    assert schedule(500, 0.3, warmup=100) == 1
    assert schedule(500, 0.7, warmup=100) == pytest.approx(0.5)
    assert schedule(500, 1.0, warmup=100) == pytest.approx(0.0)


def test_base_learns_a_batch_by_heart(out: Path) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    unet, text = make_base(TINY)
    objective = Objective.from_scheduler(make_scheduler())
    clips = Clips.load(out, torch.device("cpu"))
    drawn = clips.draw(4, generator, drop=0.1, realistic=0.1)
    batch = {key: drawn[key] for key in ("latents", "tokens", "subject")}
    batch = with_noise(batch, objective, generator, torch.float32, shift=2.0)
    trainer = GraphTrainer(
        lambda **b: base_loss(unet, text, objective, **b), [([*unet.parameters(), *text.parameters()], 3e-3)]
    )
    losses = []
    for _ in range(25):
        trainer.step(batch, 1.0)
        losses.append(trainer.read()["loss"])
    assert losses[-1] < 0.6 * losses[0]


def test_adapter_learns_a_batch_by_heart_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    unet = make_unet(TINY, None)
    for name, parameter in unet.named_parameters():
        if name.startswith("conv_out") or "temporal_transformer.proj_out" in name:
            nn.init.normal_(parameter, std=0.1)
    unet.initialize_adapter()
    set_scalers(unet, open_always=False)
    unet.requires_grad_(False)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    trained = dict(unet.adapter_parameters())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    objective = Objective.from_scheduler(make_scheduler())
    shape = (2, 4, TINY.frames, 4, 4)
    reference, target, noise, reference_noise = torch.randn(4, *shape)
    text, empty = torch.randn(2, 16, TINY.text_width), torch.randn(1, 16, TINY.text_width)
    trainer = GraphTrainer(
        lambda reference, target, timestep: adapter_loss(
            unet, objective, reference, target, text, empty, timestep, noise, reference_noise
        ),
        [(list(trained.values()), 1e-2)],
    )
    losses = []
    for _ in range(15):
        trainer.step({"reference": reference, "target": target, "timestep": torch.tensor([300, 800])}, 1.0)
        losses.append(trainer.read()["loss"])
    assert losses[-1] < 0.9 * losses[0]
    changed = {k for k, v in unet.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(trained)


def test_losses_never_wait_for_the_device() -> None:
    # The meta device has no values: whatever asks for one, which a CUDA graph cannot hold, fails.
    kind = {"device": "meta", "dtype": torch.bfloat16}
    with torch.device("meta"):
        (unet, text), adapted, vae = make_base(SMALL), make_unet(SMALL, None), make_vae(SMALL)
    for module in (unet, text, adapted, vae):
        module.to(torch.bfloat16)
    objective = Objective.from_scheduler(make_scheduler(), "meta")
    latents = torch.empty(8, SMALL.latents, 16, 16, 16, **kind)
    noise, t = torch.empty(latents.shape, device="meta"), torch.empty(8, dtype=torch.long, device="meta")
    tokens = torch.empty(8, 16, dtype=torch.long, device="meta")
    torch.autograd.grad(
        base_loss(unet, text, objective, latents, tokens, noise, t), [*unet.parameters(), *text.parameters()]
    )
    readers = tuple(
        reader_of(modules.values(), **kind) for modules in (adapted.motion_modules(), adapted.fusion_modules())
    )
    subject = torch.empty(8, 1, 16, 16, 16, **kind)
    parts = {"latents": latents, "tokens": tokens, "noise": noise, "timestep": t, "subject": subject}
    targets = {"target" if key == "latents" else f"target_{key}": part[:4] for key, part in parts.items()}
    truth = {"displacement": torch.empty(8, 16, 2, 16, 16, **kind), "pose": torch.empty(8, 16, 4, 16, 16, **kind)}
    truth["upright"] = torch.empty(8, **kind)
    loss = video_loss(adapted, text, objective, readers, 0.5, 2, **truth, **parts, **targets)
    torch.autograd.grad(
        loss, [*adapted.parameters(), *text.parameters(), *readers[0].parameters(), *readers[1].parameters()]
    )
    hidden = text(tokens)[0].detach()
    loss = adapter_loss(adapted, objective, latents, latents, hidden, hidden[:1], t, noise, noise)
    torch.autograd.grad(loss, [p for _, p in adapted.adapter_parameters()])
    frames = torch.empty(2, 3, 128, 128, **kind)
    subject, noise = torch.empty(2, 1, 128, 128, **kind), torch.empty(2, SMALL.latents, 16, 16, **kind)
    torch.autograd.grad(vae_loss(vae, frames, subject, noise), list(vae.parameters()))


# ------------------------------------------------------------------------------------------------------- the stages


def test_shipped_sizes_fit_their_budget() -> None:
    with torch.device("meta"):
        parts = [make_vae(SMALL), make_unet(SMALL, None), make_text_encoder(SMALL.text_width, SMALL.text_layers)]
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) <= assemble.LIMIT - 2**18


def test_frames_train_without_motion_modules_and_get_them_back() -> None:
    unet = make_unet(TINY, ())
    before = {name for name, _ in unet.named_parameters()}
    with without_motion_modules(unet):
        assert not any("motion_modules" in name for name, _ in unet.named_parameters())
    assert {name for name, _ in unet.named_parameters()} == before


def test_extra_weight_lies_on_subjects_and_only_where_they_show_through_the_noise() -> None:
    world = make_world(torch.device("cpu"), TINY)
    motions = world.motions(3, torch.Generator().manual_seed(0), two_subjects=0.0)
    covered = cover(motions, 16)
    assert covered.shape == (3, TINY.frames, 16, 16)
    x, y = (motions.position[0, 0, 0] / 8).long().tolist()
    assert covered[0, 0, y, x] == 1
    share = covered.float().mean((2, 3)) / (math.pi / 4 * (motions.scale[:, :, 0] / 128).square())
    assert share.min() > 0.6
    assert share.max() < 1.4

    objective = Objective.from_scheduler(make_scheduler())
    latents, noise = torch.randn(2, 1, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    wrong = objective.target(latents, noise, 0) + torch.tensor([1.0, 0.0])  # in the left column
    everywhere = objective.loss(wrong, latents, noise, 0)
    assert objective.loss(wrong, latents, noise, 0, torch.tensor([0.0, 3.0])) == pytest.approx(everywhere.item())
    assert objective.loss(wrong, latents, noise, 0, torch.tensor([3.0, 0.0])) == pytest.approx(2.0, rel=1e-2)
    last = objective.target(latents, noise, 999) + 1
    assert objective.loss(last, latents, noise, 999, torch.tensor(3.0)) == pytest.approx(1.0)


def test_a_reader_reads_displacements_steps_and_poses_at_every_resolution() -> None:
    """No loss where hidden states hold the truth, that of 0.2 units where they are off by more, none in noise."""
    unet = make_unet(TINY, ())
    reader = reader_of(unet.motion_modules().values())
    generator = torch.Generator().manual_seed(0)
    displacement = 20 * torch.randn(2, TINY.frames, 2, 4, 4, generator=generator)
    steps = displacement - torch.cat([displacement[:, :1], displacement[:, :-1]], 1)
    # A subject in the left half, held alike in all of it.
    angle, turn, size = torch.randn(3, 2, TINY.frames, 1, 1, 1, generator=generator)
    there = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, TINY.frames, 1, 4, 4)
    pose = torch.cat([angle.sin(), angle.cos(), turn, size], 2) * there
    held = torch.cat([angle.sin(), angle.cos() - 1, turn, size], 2).expand(-1, -1, -1, 4, 4)
    units = torch.tensor(MotionReader.UNITS).view(-1, 1, 1)
    truth = torch.cat([displacement, steps, held], 2).flatten(0, 1) / units
    hidden = []
    for path, module in unet.motion_modules().items():
        width = module.temporal_transformer.proj_out.out_features
        shrink = 1 if path.startswith(("down_blocks.0", "up_blocks.1")) else 2
        hidden.append(F.pad(F.avg_pool2d(truth, shrink), (0, 0, 0, 0, 0, width - len(units))))
    for linear in reader.maps:
        nn.init.eye_(linear.weight)
    both, first = torch.ones(2), torch.tensor([1.0, 0.0])

    def off(by: float, upright: torch.Tensor = both, share: torch.Tensor = both, only: slice = slice(None)) -> float:
        changed = [states.clone() for states in hidden]
        for states in changed:
            states[:, : len(units)][:, only] += by
        return reader(changed, displacement, pose, upright, share).item()

    assert off(0.0) == pytest.approx(0, abs=1e-6)
    assert list(reader.explained().values()) == pytest.approx([1] * 8)
    assert off(0.2) == pytest.approx(0.1, abs=1e-6)
    assert off(0.2, share=first) == pytest.approx(0.05, abs=1e-6)
    # Of what has no upright the rotation is not read, but how it turns.
    assert off(0.2, upright=torch.zeros(2), only=slice(4, 6)) == 0
    assert off(0.2, upright=torch.zeros(2), only=slice(6, 8)) == pytest.approx(0.1 / 4, abs=1e-6)
    reader.explained()
    reader([torch.zeros_like(states) for states in hidden], displacement, pose, both, both)
    assert list(reader.explained().values()) == pytest.approx([0] * 8, abs=1e-6)


def drifting_textures(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch of the motion stage: textures without landmarks, each drifting its own way at 3 pixels a frame or so."""
    side, frames = 8, TINY.frames
    f = torch.fft.fftfreq(3 * side)
    spectrum = torch.fft.fft2(torch.randn(n, TINY.latents, 3 * side, 3 * side, generator=generator))
    spectrum = spectrum * torch.exp(-(f[:, None].square() + f.square()) / (2 * 0.12**2))
    spectrum = spectrum * (3 * side / spectrum.abs().square().mean().sqrt())
    shift = 0.4 * torch.randn(n, 1, 2, generator=generator) * torch.arange(frames)[:, None]
    x, y = shift[..., None, None].unbind(2)
    moved = spectrum[:, :, None] * torch.exp(-2j * math.pi * (f * x + f[:, None] * y))[:, None]
    latents = torch.fft.ifft2(moved).real[..., side : 2 * side, side : 2 * side].contiguous()
    displacement = (-8 * shift)[..., None, None].expand(n, frames, 2, side, side).contiguous()
    return {
        "latents": latents,
        "displacement": displacement,
        "pose": torch.zeros(n, frames, 4, side, side),  # no subjects
        "upright": torch.ones(n),
        "noise": torch.randn(latents.shape, generator=generator),
        "tokens": torch.zeros(n, 16, dtype=torch.long),
        "timestep": torch.full((n,), 50),
        "subject": torch.zeros(n, 1, frames, side, side),
    }


@pytest.mark.slow
def test_the_motion_stage_learns_to_see_what_moves() -> None:
    """Of textures that it has never seen, and which say nothing but by moving: four minutes on two cores."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    unet, text = make_unet(TINY, ()), make_text_encoder(TINY.text_width, TINY.text_layers)
    reader = reader_of(unet.motion_modules().values())
    objective = Objective.from_scheduler(make_scheduler())
    trainer = GraphTrainer(
        lambda **batch: motion_loss(unet, text, objective, reader, 5.0, **batch)[0],
        [([*unet.parameters(), *text.parameters()], 3e-3), (list(reader.parameters()), 9e-3)],
    )
    for step in range(600):
        if step == 580:
            reader.explained()
        trainer.step(drifting_textures(32, generator), schedule(step, step / 600, warmup=50))
    explained = reader.explained()
    assert min(explained[f"r2_{name}"] for name in ("x", "y", "step_x", "step_y")) > 0.5


def test_the_video_stage_trains_a_backbone_to_tell_motion_to_its_adapter() -> None:
    """The loss of a target depends on its reference, by features through which gradients reach the backbone."""
    torch.manual_seed(0)
    unet, text = make_unet(TINY, None), make_text_encoder(TINY.text_width, TINY.text_layers)
    for name, parameter in unet.named_parameters():
        if name.startswith("conv_out") or "temporal_transformer.proj_out" in name:
            nn.init.normal_(parameter, std=0.1)
    set_scalers(unet, open_always=False)
    readers = tuple(reader_of(modules.values()) for modules in (unet.motion_modules(), unet.fusion_modules()))
    objective = Objective.from_scheduler(make_scheduler())
    latents, noise = torch.randn(2, 3, 4, TINY.frames, 4, 4)
    parts = {"latents": latents, "noise": noise, "tokens": torch.zeros(3, 16, dtype=torch.long)}
    parts |= {"timestep": torch.tensor([100, 100, 500]), "subject": torch.zeros(3, 1, TINY.frames, 4, 4)}
    target = {"target" if key == "latents" else f"target_{key}": part[1:] for key, part in parts.items()}
    truth = {"displacement": torch.full((3, TINY.frames, 2, 4, 4), 10.0), "upright": torch.ones(3)}
    truth["pose"] = torch.ones(3, TINY.frames, 4, 4, 4)

    def loss(weight: float, **changed: torch.Tensor) -> torch.Tensor:
        return video_loss(unet, text, objective, readers, weight, 2, **(parts | target | truth | changed))

    alone = base_loss(unet, text, objective, *(parts[key] for key in ("latents", "tokens", "noise", "timestep")))
    following = loss(0.0) - alone
    other = latents.clone()
    other[:2] = other[:2].flip(3)  # the references' pictures move otherwise
    alone = base_loss(unet, text, objective, other, *(parts[key] for key in ("tokens", "noise", "timestep")))
    assert abs((loss(0.0, latents=other) - alone - following).item()) > 1e-4
    assert loss(0.5).item() > loss(0.0).item()
    for reader in readers:  # both are read
        (gradient,) = torch.autograd.grad(loss(0.5), [reader.maps[-1].bias])
        assert gradient.abs().max() > 0
    key = unet.up_blocks[1].motion_modules[0].temporal_transformer.transformer_blocks[0].attention_blocks[0].adapter
    for parameter in (unet.conv_in.weight, key.to_k.weight, next(iter(text.parameters()))):
        (gradient,) = torch.autograd.grad(loss(0.0), [parameter])
        assert gradient.abs().max() > 0


def test_pairs_share_their_motion_and_differ_in_appearance() -> None:
    motion, view = torch.arange(5).view(5, 1), torch.arange(4).view(1, 4)
    latents = torch.stack(torch.broadcast_tensors(motion, view), -1).float()[..., None, None, None]
    covered = motion[..., None, None].to(torch.uint8)
    clips = Clips(latents, (motion * 10 + view)[..., None].int(), covered, motion, 7 * motion)

    def draw(**how: Any) -> tuple[dict[str, torch.Tensor], ...]:
        return clips.draw_pairs(400, torch.Generator().manual_seed(0), drop=0.0, realistic=0.3, targets=2, **how)

    def shown(part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return part["latents"][..., 0, 0, 0].unbind(1)

    references, targets = draw()
    (motion, worn), (played, requested) = shown(references), shown(targets)
    assert torch.equal(motion.repeat(2), played)  # target i follows reference i mod n
    assert (worn.repeat(2) != requested).all()
    assert (requested[:400] != requested[400:]).all()
    assert (requested < 3).all()
    assert 0.2 < (worn == 3).float().mean() < 0.4
    assert torch.equal(targets["tokens"][:, 0], (played * 10 + requested).long())
    assert torch.equal(targets["subject"].flatten(), SUBJECT_WEIGHT * played)
    for part, truth, look in ((references, motion, worn), (targets, played, requested)):
        assert torch.equal(part["displacement"][:, 0], truth)
        assert torch.equal(part["pose"][:, 0], 7 * truth)
        assert torch.equal(part["upright"], (look < 3).float())
    wrong = shown(draw(mismatched=1.0)[0])[0]
    assert (wrong != motion).float().mean() > 0.6


def test_finished_stages_are_not_repeated(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [out / result for _, result, _ in train_all.STAGES.values()]
    times = [path.stat().st_mtime_ns for path in results]
    train_all.main(["--out", str(out), "--tiny", "--device", "cpu", "--steps", "3", "--judge-minutes", "0"])
    assert [path.stat().st_mtime_ns for path in results] == times
    assert "[adapter] is done" in capsys.readouterr().out
    stages = {json.loads(line)["stage"] for line in (out / "log.jsonl").read_text().splitlines()}
    assert stages == set(train_all.STAGES)


def test_training_goes_on_from_a_stages_result(out: Path, tmp_path: Path) -> None:
    (tmp_path / "latents.safetensors").symlink_to(out / "latents.safetensors")
    arguments = ["--out", str(tmp_path), "--tiny", "--device", "cpu", "--steps", "1", "--batch", "5", "--rate", "0"]
    train_base.main(["video", *arguments, "--start-from", str(out / "video.safetensors"), "--save-minutes", "0"])
    before, after = (load_weights(folder / "video.safetensors", "adapter") for folder in (out, tmp_path))
    projections = [name for name in before if ".adapter." in name]
    assert projections
    for name in projections:
        assert torch.equal(before[name], after[name])
    assert not (tmp_path / "video-so-far.safetensors").exists()


def test_a_short_training_keeps_the_scalers_and_needs_no_stage_for_the_adapter(out: Path, tmp_path: Path) -> None:
    for part in ("latents.safetensors", "vae"):
        (tmp_path / part).symlink_to(out / part)
    arguments = ["--out", str(tmp_path), "--tiny", "--device", "cpu", "--steps", "1", "--batch", "5", "--rate", "0"]
    short = ["--keep-scalers", "--average", "0.5"]
    train_base.main(["video", *arguments, "--start-from", str(out / "model"), *short])
    assemble.main(["--out", str(tmp_path), "--tiny", "--adapter", "video"])
    first, same = (MotionTransferPipeline.from_pretrained(f) for f in (out / "model", tmp_path / "model-video"))
    assert same.config.reference_timestep == first.config.reference_timestep
    before, after = first.unet.state_dict(), same.unet.state_dict()
    assert before.keys() == after.keys()
    assert any(".scaler." in name for name in before)
    for name, weight in before.items():
        assert torch.equal(weight, after[name])


def test_an_ablation_trains_beside_the_model(out: Path) -> None:
    arguments = ["--out", str(out), "--tiny", "--device", "cpu", "--steps", "2", "--batch", "2"]
    train_adapter.main([*arguments, "--name", "ablation", "--fusion-blocks", "1", "--no-scaler"])
    state = load_weights(out / "ablation.safetensors", "adapter")
    assert all(name.startswith("up_blocks.1") for name in state)
    biases = [v for name, v in state.items() if name.endswith("spatial_convs.2.bias")]
    assert all(torch.equal(b, torch.full_like(b, 20.0)) for b in biases)
    assemble.main(["--out", str(out), "--tiny", "--adapter", "ablation"])
    loaded = MotionTransferPipeline.from_pretrained(out / "model-ablation")
    assert list(loaded.unet.config.fusion_blocks) == [1]
    assert not [file for file in (out / "model-ablation").rglob("*.json") if str(out) in file.read_text()]


def test_ablations_train_what_is_missing_and_make_the_table(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Judge(JudgeVocabulary.of_world()).save(out / "judge.safetensors")
    arguments = ["--out", str(out), "--tiny", "--device", "cpu", "--steps", "2", "--batch", "2", "--clips", "3"]
    arguments += ["--names", "full", "up-block-1", "--sampler-steps", "2", "--workers", "1"]
    # One that was cut off after a step is trained again, one that is complete is kept.
    train_adapter.main([*arguments[:5], "--steps", "1", "--batch", "2", "--name", "full"])
    ablations.train_variants(["up-block-1"], ablations.parse(arguments))
    kept = (out / "up-block-1.safetensors").stat().st_mtime_ns
    ablations.main(arguments)
    assert ablations.trained_steps(out / "full.safetensors") == 2
    assert (out / "up-block-1.safetensors").stat().st_mtime_ns == kept
    assert "[up-block-1] is done" in capsys.readouterr().out

    rows = json.loads((out / "ablations.json").read_text())
    names = ["backbone without reference", "full method", "reference in up block 1 only", "full method, all steps"]
    assert list(rows) == names
    assert [row["steps"] for row in rows.values()] == [0, 2, 2, 3]
    for row in rows.values():
        assert all(row[column]["clips"] for column in ablations.COLUMNS if column != "camera")
        assert row["temporal_consistency"]["low"] <= row["temporal_consistency"]["value"]
    table = (out / "ablations.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:6]] == [f"| {name}" for name in names]


def beside(out: Path, folder: Path) -> list[str]:
    """Arguments of a recipe that goes on from the model and the latents of all stages, in a folder of its own."""
    if not (folder / "latents.safetensors").exists():
        (folder / "latents.safetensors").symlink_to(out / "latents.safetensors")
    common = ["--out", str(folder), "--model", str(out / "model"), "--tiny", "--device", "cpu"]
    return [*common, "--batch", "2"]


def test_a_lora_of_few_steps_is_distilled_and_its_file_changes_the_layers_that_it_trained(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = beside(out, tmp_path)
    distil.main([*arguments, "--steps", "2", "--rank", "2", "--rate", "0.1"])
    pipe = MotionTransferPipeline.from_pretrained(out / "model", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(tmp_path / "lcm-lora.safetensors")
    changed = {name for name, tensor in pipe.unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(".adapter." in name for name in changed)
    assert any(".conv1." in name for name in changed)
    assert not any(".scaler." in name for name in changed)
    Judge(JudgeVocabulary.of_world()).save(tmp_path / "judge.safetensors")
    rows = ["--rows", "ddim:2", "fast:2", "--distilled", "lcm:1", "euler:1:1", "--clips", "3", "--tracked", "1"]
    lora = ["--lora", str(tmp_path / "lcm-lora.safetensors"), "--judge", str(tmp_path / "judge.safetensors")]
    samplers.main([*arguments, *rows, *lora])
    capsys.readouterr()
    table = (tmp_path / "samplers.md").read_text().splitlines()
    names = ["ddim, 2 steps", "fast, 2 steps", "lcm, 1 steps, LoRA", "euler, 1 steps, guidance 1, LoRA"]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in names]


def test_a_consistency_model_returns_a_clip_without_noise_as_it_is() -> None:
    objective = Objective.from_scheduler(make_scheduler())
    latents, noise = torch.randn(2, 2, 4, 2, 4, 4)
    for step in (19, 499, 999):
        timestep = torch.full((2,), step)
        noisy = objective.add_noise(latents, noise, timestep)
        found = distil.clip_and_noise(objective, objective.target(latents, noise, timestep), noisy, timestep)
        torch.testing.assert_close(found[0], latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], noise, rtol=1e-4, atol=1e-4)
    start = torch.zeros(2, dtype=torch.long)
    assert torch.equal(distil.consistent(objective, noise, latents, start), latents)


def test_a_gain_is_how_far_the_result_goes() -> None:
    true = torch.linspace(0, 1, 16) * torch.tensor([[40.0], [-20.0], [8.0], [1.0]])  # the last one rests
    found = pans.agreement(true, 0.6 * true)
    assert found["clips"] == 3
    for name in ("gain", "low", "high", "median"):
        assert found[name] == pytest.approx(0.6)
    assert found["pearson"] == pytest.approx(1)
    motions = pans.draw_pans(make_world(torch.device("cpu"), TINY), 6, torch.Generator().manual_seed(0))
    assert len(motions) == 6
    assert pans.panning(motions).all()


def test_gains_of_a_model_are_measured_beside_those_of_true_renders(out: Path, tmp_path: Path) -> None:
    Judge(JudgeVocabulary.of_world()).save(tmp_path / "judge.safetensors")
    pans.main([*beside(out, tmp_path), "--judge", str(tmp_path / "judge.safetensors"), "--clips", "2", "--steps", "1"])
    rows = json.loads((tmp_path / "pans.json").read_text())
    assert {name.split(", ")[0] for name in rows} == {"footage", "rendered", "floor"}
    assert all(0 <= row["clips"] <= 2 for row in rows.values())
    table = (tmp_path / "pans.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in rows]
    by_scene = [name for name in rows if name.startswith("floor, ") and name.endswith(", both")]
    assert len(by_scene) == len(SCENES)
    assert sum(rows[name]["clips"] for name in by_scene) <= 4  # two axes of two clips

    fewer = ["--clips", "2", "--steps", "1", "--kinds", "footage", "--tracked", "0", "--name", "fewer"]
    pans.main([*beside(out, tmp_path), "--judge", str(tmp_path / "judge.safetensors"), *fewer])
    again = json.loads((tmp_path / "fewer.json").read_text())
    assert again == {name: row for name, row in rows.items() if name.startswith("footage") and "tracked" not in name}


def test_a_control_network_is_trained_opens_and_is_tried(out: Path, tmp_path: Path) -> None:
    control.train_control([*beside(out, tmp_path), "--steps", "2", "--rate", "0.1"])
    unet = MotionTransferPipeline.from_pretrained(out / "model", dtype=torch.float32).unet
    trained = open_control(tmp_path / "control.safetensors", unet.config)
    assert trained.controlnet_mid_block.weight.any()
    mask = control.draw_mask(400, 16, torch.Generator().manual_seed(0)).flatten(1)
    assert mask.any(1).all()
    assert 0.5 < mask[:, 0].mean() < 0.8
    assert mask.sum(1).max() <= 4
    Judge(JudgeVocabulary.of_world()).save(tmp_path / "judge.safetensors")
    trial = ["--judge", str(tmp_path / "judge.safetensors"), "--clips", "2", "--steps", "1", "--scale", "0"]
    control.try_control([*beside(out, tmp_path), *trial, "--trials", "as it is", "pictures"])
    without, with_pictures = json.loads((tmp_path / "trial.json").read_text()).values()
    assert without == with_pictures  # at a scale of nothing
    assert len((tmp_path / "trial.md").read_text().splitlines()) == 4


def test_a_model_is_trained_further(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minutes, result, render = train_all.STAGES["latents"]
    rendered: list[list[str]] = []
    monkeypatch.setitem(train_all.STAGES, "latents", (minutes, result, lambda a: (rendered.append(a), render(a))))
    arguments = ["--out", str(tmp_path), "--tiny", "--device", "cpu", "--steps", "1", "--batch", "2"]
    train_all.main([*arguments, "--start-from", str(out / "model"), "--judge-minutes", "0"])
    ((*_, option, share),) = rendered  # one that sees what moves is shown cameras that go far
    assert (option, share) == ("--swift", "0.5")
    first, further = (MotionTransferPipeline.from_pretrained(folder / "model") for folder in (out, tmp_path))
    assert further.vae.config.scaling_factor == first.vae.config.scaling_factor
    assert torch.equal(further.vae.encoder.conv_in.weight, first.vae.encoder.conv_in.weight)
    before, after = first.unet.state_dict(), further.unet.state_dict()
    assert before.keys() == after.keys()
    # One step at a tenth of a percent: close to where it started, but not there.
    kept = [key for key in before if ".scaler." not in key]  # scalers start anew
    assert max((before[k] - after[k]).abs().max().item() for k in kept) < 0.02
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])


# ------------------------------------------------------------------------------------------------ several processes


def test_two_processes_take_the_steps_of_one_with_both_batches(tmp_path: Path) -> None:
    in_two_processes(train_half, tmp_path)
    start = torch.load(tmp_path / "start.pt", weights_only=False)
    alone, loss = trained(start, slice(None))
    for rank in range(2):
        master, averaged, mean_loss = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(master, alone.master, atol=1e-6)
        assert torch.allclose(averaged, alone.averaged, atol=1e-6)
        assert mean_loss == pytest.approx(loss, rel=1e-5)

    (steps, master, seed), (other_steps, other_master, other_seed) = (
        torch.load(tmp_path / f"clock-{rank}.pt") for rank in range(2)
    )
    assert steps == other_steps > 0
    assert steps % 20 == 0
    assert torch.equal(master, other_master)
    assert seed != other_seed
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [*range(20, steps + 1, 20), steps]
    assert log[-1]["apart"] == 0


@pytest.mark.parametrize("recipe", [render_latents, train_base, train_adapter, train_all, train_vae])
def test_torchrun_takes_no_option_of_a_recipe_for_its_own(recipe: ModuleType, capsys: pytest.CaptureFixture[str]):
    # It refuses what could begin one of its own, even behind the recipe's name: --start, of --start-method.
    with pytest.raises(SystemExit, match="0"):
        recipe.main(["--help"])
    options = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help"})
    assert "--out" in options
    for option in options:
        torchrun = distributed_run.get_args_parser().parse_args(["-m", recipe.__name__, option, "1"])
        assert torchrun.training_script_args == [option, "1"]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])])
def test_recipe_runs_in_two_processes_and_leaves_one_set_of_results(device: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "recipes.train_all", "--out", str(tmp_path / "out"), "--tiny", "--device", device]
    command += ["--steps", "2", "--batch", "2", "--judge-minutes", "0", "--until", "adapter"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "out"
    results = {result for _, result, _ in train_all.STAGES.values()}
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("model/")} == {
        *results,
        "vae/config.json",
        "latents-1.safetensors",
        "log.jsonl",
    }
    assert MotionTransferPipeline.from_pretrained(out / "model").config.frames == TINY.frames
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {record["stage"]: record["apart"] for record in log if "apart" in record} == dict.fromkeys(
        ("vae", "frames", "motion", "video", "adapter"), 0
    )
    first, second = (
        load_weights(out / name, "clips")["latents"] for name in ("latents.safetensors", "latents-1.safetensors")
    )
    assert not torch.equal(first[0], second[0])
    # Both are scaled by one factor, that of the autoencoder.
    assert (first.float().std() + second.float().std()) / 2 == pytest.approx(1, rel=0.2)
    assert ended.stdout.count("[all] adapter ended") == 1
    graphs = 5 if device == "cuda" else 0
    assert ended.stdout.count("eager losses") == ended.stdout.count("the same") == graphs
    assert "no CUDA graph" not in ended.stdout


@pytest.mark.gpu
def test_graph_trains_as_eager_does() -> None:
    torch.manual_seed(0)
    unet, text = (module.to("cuda", torch.bfloat16) for module in make_base(TINY))
    objective = Objective.from_scheduler(make_scheduler(), "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(0, 50, (4, 16), device="cuda")
    batch = {"latents": torch.randn(4, 4, TINY.frames, 4, 4, device="cuda"), "tokens": tokens}
    batch = with_noise(batch, objective, generator, torch.bfloat16, shift=1.0)
    losses = []
    for graph in (False, True):
        parts = copy.deepcopy((unet, text))
        trainer = GraphTrainer(
            lambda parts=parts, **b: base_loss(*parts, objective, **b),
            [([p for part in parts for p in part.parameters()], 1e-3)],
            graph=graph,
        )
        for _ in range(10):
            trainer.step(batch, 1.0)
        losses.append(trainer.read()["loss"])
        assert bool(trainer._graphs) == graph
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_folder_generates_and_is_measured(pipeline: MotionTransferPipeline) -> None:
    assert pipeline.config.frames == TINY.frames
    world = make_world(torch.device("cpu"), TINY)
    judge = Judge(JudgeVocabulary.of_world())
    columns, sheet = evaluate(pipeline, judge, world, clips=3, seeds=1, batch=2, steps=2)
    assert set(columns) == {"adapted", "without reference", "floor: through the VAE", "floor: renders"}
    # Three pairs in two columns: right of their labels, and each below its prompt.
    across, down = TINY.frames * 32 + 8, 17 + 2 * 32 + 8
    assert sheet.size == (71 + 2 * across, 2 * down)
    captions = [sheet.crop((left, 0, left + across, 17)).convert("L") for left in (71, 71 + across)]
    assert all(caption.getextrema() == (0, 255) for caption in captions)


def test_motions_read_together_are_those_read_alone(pipeline: MotionTransferPipeline) -> None:
    clips = torch.randint(0, 255, (2, TINY.frames, 3, 32, 32), dtype=torch.uint8)
    both = read_motions(pipeline, clips, seed=0)
    first = next(iter(both.features.layers.values()))[0]
    assert first.shape[0] == 2
    alone = read_motions(pipeline, clips[:1], seed=0)
    assert torch.allclose(first[:1], next(iter(alone.features.layers.values()))[0], atol=1e-4)


def test_real_clips_are_played_measured_and_shown(out: Path, tmp_path: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8)
    scene = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    write_clip(tmp_path / "clips" / "pan.mp4", np.stack([scene[:, 8 * i : 8 * i + 128] for i in range(8)]), 8)
    arguments = ["--clips", str(tmp_path / "clips"), "--model", str(out / "model"), "--out", str(tmp_path / "out")]
    real_clips.main(
        [*arguments, "--prompts", "a red cat", "a blue dog over the sea", "--seeds", "2", "--device", "cpu"]
    )
    results = tmp_path / "out"
    rows = [json.loads(line) for line in (results / "real_clips.jsonl").read_text().splitlines()]
    requested = [("a red cat", 0), ("a red cat", 1), ("a blue dog over the sea", 0), ("a blue dog over the sea", 1)]
    assert [(row["prompt"], row["seed"]) for row in rows] == requested
    assert {row["kind"] for row in rows} == {"camera"}
    assert all(Path(row["result"]).is_file() and -1 <= row["camera"] <= 1 for row in rows)
    assert "| pan | camera |" in (results / "real_clips.md").read_text()
    assert "Global motion of 4 results of camera clips" in (results / "real_clips.md").read_text()
    with Image.open(results / "real_clips.png") as sheet:
        assert sheet.size == (TINY.frames * 32 + 8, 5 * (17 + 32 + 8))  # the reference and its four results
    pairs = [json.loads(line) for line in (results / "pairs.jsonl").read_text().splitlines()]
    assert all((results / pair["result"]).is_file() and Path(pair["reference"]).is_file() for pair in pairs)
