"""Importing the published file kinds: each is written at a small width, imported, and compared number by number."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program import console
from published import SMALL, relative_error, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel
from weight_files import (
    CONV,
    OUT,
    POINTWISE,
    SPATIAL,
    TEMPORAL,
    TEMPORAL_OUT,
    TEXT,
    TEXT_SIZES,
    TEXT_WIDTH,
    VAE_SIZES,
    WIDTHS,
    Files,
    Imported,
    Parts,
    Payload,
    State,
    assert_same_weights,
    diffusers_folder,
    drop,
    kohya,
    ldm_file,
    ldm_text_encoder,
    ldm_unet,
    ldm_vae,
    mid_block,
    motion_adapter,
    own_names,
    positions,
    with_prefix,
)

from emt import EmtError
from emt.backbones.sd15.import_weights import import_weights
from emt.backbones.sd15.random_model import byte_tokenizer, random_model
from emt.backbones.sd15.unet import MotionTransferUNet
from emt.hub import parse_lora
from emt.model_folder import find_model
from emt.pipeline import MotionTransferPipeline


def network(unet: State, motion: State, adapter: State | None, **config: Any) -> MotionTransferUNet:
    """The network loaded directly, without any file."""
    network = MotionTransferUNet(block_out_channels=WIDTHS, cross_attention_dim=TEXT_WIDTH, **config)
    network.load_published(unet | motion, adapter)
    return network.eval()


@torch.no_grad()
def assert_same_output(a: MotionTransferUNet, b: MotionTransferUNet) -> None:
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(1, 4, 3, 8, 8, generator=generator)
    sample = torch.randn(1, 4, 3, 8, 8, generator=generator)
    text = torch.randn(1, 5, TEXT_WIDTH, generator=generator)
    out = [n(sample, 601, text, n.encode_reference(reference, 400, text)) for n in (a, b)]
    assert relative_error(*out) < 1e-5


@torch.no_grad()
def assert_parts_work(pipe: MotionTransferPipeline, parts: Parts) -> None:
    """The pipeline's VAE and text encoder give what those of `parts` give."""
    vae = AutoencoderKL(**VAE_SIZES).eval()
    vae.load_state_dict(parts.vae)
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe.vae.encode(image).latent_dist.mean, vae.encode(image).latent_dist.mean)
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe.vae.decode(latents).sample, vae.decode(latents).sample)
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_SIZES)).eval()
    text_encoder.load_state_dict(with_prefix(text_encoder, parts.text_encoder), strict=False)
    ids = pipe.tokenizer("a bear", return_tensors="pt").input_ids
    assert torch.equal(pipe.text_encoder(ids)[0], text_encoder(ids)[0])


# ----------------------------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "folder", "old folder"])
def test_every_kind_of_base_gives_the_same_network(kind: str, files: Files, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if kind == "ckpt":
        extras = {"model_ema.decay": torch.ones(1), "betas": torch.ones(3), "sqrt_alphas_cumprod": torch.ones(3)}
        changes = {"base": tmp_path / "sd15.ckpt"}
        torch.save({"global_step": 1, "state_dict": ldm_file(files.base) | extras}, changes["base"])
    elif "folder" in kind:
        base = diffusers_folder(tmp_path / "sd15", files.base, old_names=kind == "old folder")
        changes = {"base": base, "tokenizer": None}
    model = files.run(tmp_path / "model", **changes)
    assert_same_weights(model.weights, files.weights())
    assert model.config["attention_heads"] == (SMALL["heads"] if "folder" in kind else 8)
    pipe = model.open()
    assert_parts_work(pipe, files.base)
    assert pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer("the ü").input_ids[1:-1]) == ["the</w>", "Ã", "¼</w>"]
    assert pipe.tokenizer.model_max_length == 77
    scheduler = pipe.scheduler.config
    assert scheduler.prediction_type == ("v_prediction" if kind == "old folder" else "epsilon")
    # AnimateDiff's, whatever the base says:
    assert (scheduler.num_train_timesteps, scheduler.beta_schedule) == (1000, "linear")
    assert (scheduler.beta_start, scheduler.beta_end) == (0.00085, 0.012)
    assert (scheduler.steps_offset, scheduler.clip_sample) == (1, False)


def test_the_model_folder_reproduces_the_published_network(files: Files, tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "sd15", files.base)
    unet = files.run(tmp_path / "model", base=folder, tokenizer=None).open().unet
    t = tensors()
    with torch.no_grad():
        motion = unet.encode_reference(t["reference_noisy"], SMALL["reference_timestep"], t["text"][:1])
        out = unet(t["sample"], SMALL["timestep"], t["text"], motion)
    assert relative_error(out, t["with_reference"]) < 1e-5


def test_half_precision_is_the_default_and_rounds_once(files: Files, tmp_path: Path) -> None:
    import_weights(tmp_path / "m", base=files.sd, motion_module=files.motion_ckpt, tokenizer=files.tokenizer)
    assert {t.dtype for t in load_file(tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    stored = Imported(tmp_path / "m").weights
    assert all(torch.equal(stored[k], v.half()) for k, v in (files.base.unet | files.motion).items())


def test_weights_beyond_half_precision_are_an_error(files: Files, tmp_path: Path) -> None:
    state = ldm_file(files.base)
    state["model.diffusion_model.out.2.bias"] = torch.full((4,), 1e6)
    save_file(state, tmp_path / "big.safetensors")
    with pytest.raises(EmtError, match=r"conv_out\.bias(.|\n)*--dtype fp32"):
        files.run(tmp_path / "m", base=tmp_path / "big.safetensors", dtype="fp16")


# ---------------------------------------------------------------------------------------------------------- DreamBooth


def test_dreambooth_replaces_unet_vae_and_text_encoder(files: Files, tmp_path: Path) -> None:
    save_file(ldm_file(files.other), tmp_path / "style.safetensors")
    model = files.run(tmp_path / "m", dreambooth=tmp_path / "style.safetensors")
    assert_same_weights(model.weights, files.weights(unet=files.other.unet))
    assert_parts_work(model.open(), files.other)


def test_dreambooth_without_vae_and_text_encoder_keeps_the_bases(files: Files, tmp_path: Path) -> None:
    save_file(ldm_unet(files.other.unet), tmp_path / "style.safetensors")
    model = files.run(tmp_path / "m", dreambooth=tmp_path / "style.safetensors")
    assert_same_weights(model.weights, files.weights(unet=files.other.unet))
    assert_parts_work(model.open(), files.base)
    assert "it has no VAE or text encoder" in model.card


# ------------------------------------------------------------------------------------------------------ motion modules


@pytest.mark.parametrize("version", ["v1", "v2", "adapter folder", "adapter file"])
def test_every_kind_of_motion_module(version: str, files: Files, tmp_path: Path) -> None:
    motion = dict(files.motion)
    if version == "v2":
        motion |= mid_block(motion)
    path = tmp_path / "mm.ckpt"
    if version == "v1":
        torch.save(motion | positions(motion, 24) | {"animatediff_config": "x"}, path)
    elif version == "v2":
        state = {f"module.{k}": v for k, v in (motion | positions(motion, 32)).items()}
        torch.save({"epoch": 1, "global_step": 9, "state_dict": state}, path)
    else:
        motion_adapter(motion, mid=False).save_pretrained(tmp_path / "mm")
        path = tmp_path / "mm"
        if version == "adapter file":
            path = tmp_path / "mm.safetensors"
            shutil.copy(tmp_path / "mm" / "diffusion_pytorch_model.safetensors", path)
    model = files.run(tmp_path / "m", motion_module=path)
    assert_same_weights(model.weights, files.weights(motion=motion))
    assert model.config["motion_mid_block"] == (version == "v2")
    assert model.config["motion_max_frames"] == (24 if version == "v1" else 32)


@torch.no_grad()
def test_names_agree_with_diffusers_own_motion_module(files: Files, tmp_path: Path) -> None:
    """Where the frames of a clip are the same, a group norm over all of them is the one of each: diffusers' is ours."""
    motion = files.motion | mid_block(files.motion)
    adapter = motion_adapter(motion, mid=True).eval()
    adapter.save_pretrained(tmp_path / "mm")
    unet = files.run(tmp_path / "m", motion_module=tmp_path / "mm").open().unet
    frames = 6
    for path in ("down_blocks.2.motion_modules.1", "mid_block.motion_modules.0", "up_blocks.1.motion_modules.2"):
        theirs, ours = adapter.get_submodule(path), unet.get_submodule(path)
        channels = ours.temporal_transformer.proj_in.in_features
        x = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(1)).repeat(frames, 1, 1, 1)
        out = ours(x, frames)
        assert (out[0] - out[1]).abs().max() > 1e-3  # the position encoding tells the frames apart
        assert relative_error(out, theirs(x, num_frames=frames)) < 1e-5


# -------------------------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("kind", ["module. prefix", "whole", "own names", "own names, whole"])
def test_every_kind_of_adapter(kind: str, files: Files, tmp_path: Path) -> None:
    # A whole network denoises with all of its weights. By its own names, it says which of them are its backbone's.
    frozen = Parts(7).unet | {k: v + 1 for k, v in files.motion.items()}
    state = {
        "module. prefix": {f"module.{k}": v for k, v in files.adapter.items()},
        "whole": frozen | files.adapter,
        "own names": own_names(files.adapter),
        "own names, whole": frozen | own_names(files.adapter),
    }[kind]
    torch.save({"global_step": 1, "state_dict": state}, tmp_path / "a.ckpt")
    model = files.run(tmp_path / "m", adapter=tmp_path / "a.ckpt")
    more = {f"denoising.{k}": v for k, v in frozen.items() if k not in files.adapter} if kind == "whole" else {}
    assert_same_weights(model.weights, files.weights() | more)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_of_some_up_blocks_makes_a_network_of_those(whole: bool, files: Files, tmp_path: Path) -> None:
    adapter = {k: v for k, v in files.adapter.items() if k.startswith(("up_blocks.1.", "up_blocks.2."))}
    save_file(adapter | (files.base.unet | files.motion | adapter if whole else {}), tmp_path / "a.safetensors")
    model = files.run(tmp_path / "m", adapter=tmp_path / "a.safetensors")
    assert_same_weights(model.weights, files.weights(adapter=adapter))
    assert model.config["fusion_blocks"] == [1, 2]


def test_without_an_adapter_it_starts_from_the_motion_module(files: Files, tmp_path: Path) -> None:
    model = files.run(tmp_path / "m", adapter=None)
    known = find_model(str(tmp_path / "m"), download=False)
    assert (known.has_adapter, known.defaults["method"]) == (False, "guidance")
    state = model.weights
    queries = [k for k in state if ".adapter.to_" in k]
    assert len(queries) == 72
    assert all(torch.equal(state[k], state[k.replace(".adapter.", ".")]) for k in queries)
    assert "starts from the motion module's projections" in model.card
    for name, tensor in state.items():  # initialised as PyTorch does
        if ".scaler." in name and tensor.ndim > 1:
            bound = tensor[0].numel() ** -0.5
            assert 0.3 * bound < tensor.std() < bound > tensor.abs().max() * 0.999, name


# --------------------------------------------------------------------------------------------------------------- LoRA


def halves(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """down and up of a weight, pointwise `up` for convolutions."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
    return down, up


# For each format: the layers, (weight of the UNet or text encoder, alpha or None, name of down, name of up).
LORAS: dict[str, list[tuple[str, float | None, str, str]]] = {
    "kohya": [
        (n, alpha, f"{kohya(n, n == TEXT)}.lora_down.weight", f"{kohya(n, n == TEXT)}.lora_up.weight")
        for n, alpha in ((SPATIAL, 1.0), (OUT, 2.0), (CONV, 4.0), (POINTWISE, 1.0), (TEXT, 2.0))
    ],
    "diffusers, PEFT names": [
        (SPATIAL, None, f"unet.{SPATIAL}.lora_A.weight", f"unet.{SPATIAL}.lora_B.weight"),
        (OUT, None, f"unet.{OUT}.lora_A.weight", f"unet.{OUT}.lora_B.weight"),
        (TEXT, None, f"text_encoder.text_model.{TEXT}.lora_A.weight", f"text_encoder.text_model.{TEXT}.lora_B.weight"),
    ],
    "diffusers, old names": [
        (
            SPATIAL,
            None,
            f"unet.{SPATIAL.replace('to_k', 'processor.to_k_lora')}.down.weight",
            f"unet.{SPATIAL.replace('to_k', 'processor.to_k_lora')}.up.weight",
        ),
        (OUT, None, f"unet.{OUT}.lora.down.weight", f"unet.{OUT}.lora.up.weight"),
        (
            TEXT,
            None,
            f"text_encoder.text_model.{TEXT}.lora_linear_layer.down.weight",
            f"text_encoder.text_model.{TEXT}.lora_linear_layer.up.weight",
        ),
    ],
    "PEFT": [
        (SPATIAL, None, f"base_model.model.{SPATIAL}.lora_A.weight", f"base_model.model.{SPATIAL}.lora_B.weight"),
    ],
    "AnimateDiff": [
        (
            TEMPORAL,
            None,
            f"module.{TEMPORAL.replace('to_q', 'processor.to_q_lora')}.down.weight",
            f"module.{TEMPORAL.replace('to_q', 'processor.to_q_lora')}.up.weight",
        ),
        (
            TEMPORAL_OUT,
            None,
            f"module.{TEMPORAL_OUT.replace('to_out.0', 'processor.to_out_lora')}.down.weight",
            f"module.{TEMPORAL_OUT.replace('to_out.0', 'processor.to_out_lora')}.up.weight",
        ),
    ],
    "diffusers motion LoRA": [
        (
            TEMPORAL,
            None,
            "unet.up_blocks.1.motion_modules.0.transformer_blocks.0.attn2.to_q.lora_A.weight",
            "unet.up_blocks.1.motion_modules.0.transformer_blocks.0.attn2.to_q.lora_B.weight",
        ),
    ],
}


def write_lora(path: Path, layers: list[tuple[str, float | None, str, str]], weights: State, seed: int = 0) -> State:
    """Write a LoRA file of rank 4; returns what each weight must gain at scale 1."""
    state, gains = {}, {}
    for i, (name, alpha, down_name, up_name) in enumerate(layers):
        down, up = halves(weights[f"{name}.weight"], 4, seed + i)
        state |= {down_name: down, up_name: up}
        if alpha is not None:
            state[f"{down_name.split('.')[0]}.alpha"] = torch.tensor(alpha)
        gain = torch.einsum("or,ri...->oi...", up.flatten(1), down) * (1 if alpha is None else alpha / 4)
        gains[f"{name}.weight"] = gain
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    return gains


def all_weights(files: Files) -> State:
    return files.base.unet | files.motion | files.base.text_encoder


@pytest.mark.parametrize("kind", LORAS)
def test_every_kind_of_lora_is_added_to_its_weights_and_to_no_others(kind: str, files: Files, tmp_path: Path) -> None:
    weights = all_weights(files)
    path = tmp_path / ("lora.ckpt" if kind == "AnimateDiff" else "lora.safetensors")
    gains = write_lora(path, LORAS[kind], weights)
    model = files.run(tmp_path / "m", loras=[(path, 0.5)])
    text = load_file(model.folder / "text_encoder" / "model.safetensors")
    merged = model.weights | {k.removeprefix("text_model."): v for k, v in text.items()}
    for name, weight in weights.items():
        expected = weight + 0.5 * gains[name] if name in gains else weight
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-6, msg=name)
    # The adapter is another set of projections than the one that a LoRA was trained on.
    assert all(torch.equal(merged[k], v) for k, v in own_names(files.adapter).items())


def test_loras_add_up(files: Files, tmp_path: Path) -> None:
    weights = all_weights(files)
    first = write_lora(tmp_path / "a.safetensors", LORAS["kohya"], weights)
    second = write_lora(tmp_path / "b.safetensors", LORAS["diffusers, PEFT names"], weights, seed=50)
    loras = [(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", -2.0)]
    name = f"{SPATIAL}.weight"
    expected = weights[name] + 0.5 * first[name] - 2.0 * second[name]
    stored = files.run(tmp_path / "m", loras=loras).weights[name]
    torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-5)


def test_a_network_with_a_lora_computes_the_low_rank_branch(files: Files, tmp_path: Path) -> None:
    gains = write_lora(tmp_path / "a.safetensors", LORAS["kohya"][:4], all_weights(files))
    unet = files.run(tmp_path / "m", loras=[(tmp_path / "a.safetensors", 0.1)]).open().unet
    changed = {k: v + 0.1 * gains[k] if k in gains else v for k, v in files.base.unet.items()}
    assert_same_output(unet, network(changed, files.motion, files.adapter))


@pytest.mark.parametrize("where", ["file", "folder"])
def test_the_scale_that_peft_records_is_kept(where: str, files: Files, tmp_path: Path) -> None:
    weight = files.base.unet[f"{SPATIAL}.weight"]
    down, up = halves(weight, 4, 0)
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {}, "use_rslora": False}
    if where == "file":
        path = tmp_path / "pytorch_lora_weights.safetensors"
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
        save_file({f"unet.{SPATIAL}.lora_A.weight": down, f"unet.{SPATIAL}.lora_B.weight": up}, path, metadata)
    else:
        path = tmp_path / "adapter_model.safetensors"
        names = [f"base_model.model.{SPATIAL}.lora_{x}.weight" for x in "AB"]
        save_file(dict(zip(names, (down, up), strict=True)), path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    stored = files.run(tmp_path / "m", loras=[(path, 1.0)]).weights[f"{SPATIAL}.weight"]
    torch.testing.assert_close(stored, weight + 2 * up @ down)


@given(st.floats(allow_nan=False, allow_infinity=False), st.from_regex(r"[a-z][a-z/.:]{0,8}[a-z]", fullmatch=True))
def test_a_scale_follows_the_last_colon(scale: float, name: str) -> None:
    assert parse_lora(f"{name}:{scale!r}") == (Path(name), scale)


def test_a_file_without_scale_has_scale_one(tmp_path: Path) -> None:
    assert parse_lora("x.safetensors") == (Path("x.safetensors"), 1.0)
    (tmp_path / "a:2").touch()
    assert parse_lora(str(tmp_path / "a:2")) == (tmp_path / "a:2", 1.0)
    for bad in ("x:y", "x:nan", "x:"):
        with pytest.raises(EmtError, match="is not a number"):
            parse_lora(bad)


# ---------------------------------------------------------------------------------------------------- what does not fit


LDM_KEY = "model.diffusion_model.output_blocks.4.1.proj_in.weight"
PUBLISHED_KEY = "up_blocks.1.attentions.1.proj_in.weight"
MOTION_KEY = "down_blocks.0.motion_modules.1.temporal_transformer.proj_in.weight"
SCALER_KEY = "up_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.scaler.spatial_convs.1.weight"


@pytest.mark.parametrize("damage", ["missing", "unexpected", "wrong shape"])
@pytest.mark.parametrize("which", ["base", "dreambooth", "motion_module", "adapter"])
def test_keys_that_do_not_fit_are_named_with_their_file(which: str, damage: str, files: Files, tmp_path: Path) -> None:
    good = {"motion_module": files.motion, "adapter": files.adapter}.get(which) or ldm_file(files.base)
    key = {"motion_module": MOTION_KEY, "adapter": SCALER_KEY}.get(which, LDM_KEY)
    shown = PUBLISHED_KEY if key == LDM_KEY else key
    if damage == "missing":
        state = drop(good, key)
    elif damage == "wrong shape":
        state = good | {key: good[key][:1].clone()}
    else:
        state = good | {key.replace("weight", "wait"): torch.ones(3)}
        shown = shown.replace("weight", "wait")
    path = tmp_path / "odd.safetensors"
    save_file(state, path)
    with pytest.raises(EmtError) as caught:
        files.run(tmp_path / "m", **{which: path})
    assert str(path) in caught.value.problem
    assert f"{damage}: {shown}" in caught.value.problem
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "key",
    [
        "first_stage_model.decoder.norm_out.scale",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.fuser.linear.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.odd.weight",
    ],
)
def test_a_layer_that_the_network_does_not_have_is_an_error(key: str, files: Files, tmp_path: Path) -> None:
    """It would compute something else without: another network."""
    save_file(ldm_file(files.base) | {key: torch.ones(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(EmtError, match=rf"odd\.safetensors(.|\n)*unexpected: .*{re.escape(key[-20:])}"):
        files.run(tmp_path / "m", base=tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("first_stage_model.decoder.norm_out.weight", r"VAE of .*missing: decoder\.conv_norm_out\.weight \(32,\)"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            r"text encoder of .*missing: final_layer_norm\.bias \(32,\)",
        ),
        ("model.diffusion_model.input_blocks.0.0.bias", r"UNet of .*missing: conv_in\.bias \(32,\)"),
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", r"UNet in .*input_blocks\.1\.0\.in_layers\.2"),
    ],
)
def test_a_key_missing_of_any_part_of_a_single_file_is_named(
    dropped: str, message: str, files: Files, tmp_path: Path
) -> None:
    save_file(drop(ldm_file(files.base), dropped), tmp_path / "odd.safetensors")
    with pytest.raises(EmtError, match="(?s)" + message) as caught:
        files.run(tmp_path / "m", base=tmp_path / "odd.safetensors")
    assert "odd.safetensors" in caught.value.problem


def test_a_text_encoder_of_another_width_is_refused(files: Files, tmp_path: Path) -> None:
    base = diffusers_folder(tmp_path / "sd", files.base)
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 48}))
    with pytest.raises(EmtError, match=r"has width 48, the UNet of .* reads 32"):
        files.run(tmp_path / "m", base=base)


def test_a_vae_of_other_latents_is_refused(files: Files, tmp_path: Path) -> None:
    """Those of newer models have 16 channels; Stable Diffusion 1.5's have 4, and configurations need not say so."""
    base = diffusers_folder(tmp_path / "sd", files.base)
    config = base / "vae" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"latent_channels": 16}))
    with pytest.raises(EmtError, match=r"VAE of .* has 16 latent channels, the UNet has 4"):
        files.run(tmp_path / "m", base=base)
    config.write_text(json.dumps({name: value for name, value in values.items() if name != "latent_channels"}))
    files.run(tmp_path / "m", base=base)


def test_keys_of_a_lora_that_do_not_fit_are_named(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    a, b, c = kohya(SPATIAL), kohya(OUT), kohya(CONV)
    state = {
        "lora_unet_nowhere.lora_down.weight": torch.ones(4, 32),
        "lora_unet_nowhere.lora_up.weight": torch.ones(32, 4),
        f"{a}.lora_down.weight": torch.ones(4, 7),
        f"{a}.lora_up.weight": torch.ones(32, 4),
        f"{b}.lora_down.weight": torch.ones(4, 32),
        f"{c}.hada_w1_a": torch.ones(4, 32),
    }
    save_file(state, path)
    with pytest.raises(EmtError) as caught:
        files.run(tmp_path / "m", loras=[(path, 1.0)])
    problem = caught.value.problem
    assert str(path) in problem
    assert "4 keys differ" in problem
    assert "no such weight in the model: lora_unet_nowhere" in problem
    assert f"wrong shape: {a} is (32, 4) × (4, 7)" in problem
    assert f"missing: the up half of {b}" in problem
    assert f"unexpected: {c}.hada_w1_a" in problem


def test_a_position_encoding_that_is_not_sinusoidal_is_refused(files: Files, tmp_path: Path) -> None:
    odd = positions(files.motion, 32)
    name = next(iter(odd))
    odd[name] = odd[name].roll(1, 1)
    torch.save(files.motion | odd, tmp_path / "mm.ckpt")
    with pytest.raises(EmtError, match=rf"mm\.ckpt.*{re.escape(name)} is not the sinusoidal"):
        files.run(tmp_path / "m", motion_module=tmp_path / "mm.ckpt")


@pytest.mark.parametrize(
    ("given_as", "file", "message"),
    [
        ("motion_module", "lora", "is a LoRA, not a motion module"),
        ("motion_module", "adapter", "is an adapter, not a motion module"),
        ("motion_module", "sd", "is Stable Diffusion 1.5 in the original layout, not a motion module"),
        ("adapter", "motion", "is a motion module, not an adapter"),
        ("base", "motion", "is a motion module, not Stable Diffusion 1.5"),
        ("base", "unet", "is a UNet in diffusers layout, not Stable Diffusion 1.5"),
        ("base", "sd2", "is a Stable Diffusion of another version (2 or XL)"),
        ("base", "vae", "is a VAE, not Stable Diffusion"),
    ],
)
def test_a_file_of_another_kind_is_named(given_as: str, file: str, message: str, files: Files, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.safetensors", LORAS["kohya"], all_weights(files))
    save_file(files.base.unet, tmp_path / "unet.safetensors")
    save_file(files.base.vae, tmp_path / "vae.safetensors")
    sd2 = ldm_unet(files.base.unet) | {"cond_stage_model.model.ln_final.weight": torch.ones(3)}
    save_file(sd2, tmp_path / "sd2.safetensors")
    known = {"adapter": files.adapter_ckpt, "motion": files.motion_ckpt, "sd": files.sd}
    path = known.get(file, tmp_path / f"{file}.safetensors")
    with pytest.raises(EmtError, match=re.escape(f"{path} {message}")):
        files.run(tmp_path / "m", **{given_as: path})


def test_a_lora_must_be_one(files: Files, tmp_path: Path) -> None:
    with pytest.raises(EmtError, match="is a motion module, not a LoRA"):
        files.run(tmp_path / "m", loras=[(files.motion_ckpt, 1.0)])


def test_a_folder_of_another_model_is_refused_by_its_configuration(files: Files, tmp_path: Path) -> None:
    base = diffusers_folder(tmp_path / "sd", files.base)
    path = base / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_linear_projection": True, "in_channels": 9}))
    with pytest.raises(EmtError, match=r"in_channels is 9, supported is 4\n *use_linear_projection is True"):
        files.run(tmp_path / "m", base=base)


def test_what_is_missing_is_named(files: Files, tmp_path: Path) -> None:
    with pytest.raises(EmtError, match=r"the motion module .*none\.ckpt does not exist"):
        files.run(tmp_path / "m", motion_module=tmp_path / "none.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        EmtError, match=r"empty holds no files of weights\nGive a file, or a folder in diffusers layout"
    ):
        files.run(tmp_path / "m", base=tmp_path / "empty")
    save_file(ldm_unet(files.base.unet), tmp_path / "pruned.safetensors")
    with pytest.raises(EmtError, match="has no VAE and no text encoder"):
        files.run(tmp_path / "m", base=tmp_path / "pruned.safetensors")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("which", ["base", "motion_module"])
def test_a_hub_id_that_cannot_be_fetched_is_one_clear_error(which: str, files: Files, tmp_path: Path) -> None:
    with pytest.raises(EmtError, match=r"nobody/nothing is no path here and cannot be fetched.*\n.*hf download"):
        files.run(tmp_path / "m", **{which: "nobody/nothing"})


@pytest.mark.usefixtures("offline")
def test_a_single_file_without_a_tokenizer_says_what_to_type(files: Files, tmp_path: Path) -> None:
    with pytest.raises(EmtError, match=r"openai/clip-vit-large-patch14(.|\n)*--tokenizer FOLDER"):
        files.run(tmp_path / "m", tokenizer=None)


def test_a_tokenizer_larger_than_the_text_encoder_is_refused(files: Files, tmp_path: Path) -> None:
    big = byte_tokenizer(tmp_path / "t")
    big.add_tokens([f"word{i}" for i in range(200)])
    big.save_pretrained(tmp_path / "big")
    with pytest.raises(EmtError, match=r"725 tokens, the text encoder knows 600"):
        files.run(tmp_path / "m", tokenizer=tmp_path / "big")


# ------------------------------------------------------------------------------------------------------ hostile files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("which", ["base", "motion_module", "adapter", "dreambooth"])
def test_a_malicious_pickle_is_refused_and_not_run(which: str, zipped: bool, files: Files, tmp_path: Path) -> None:
    path, target = tmp_path / "evil.ckpt", tmp_path / "created"
    content = {"state_dict": files.motion, "callbacks": Payload(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(EmtError, match=r"evil\.ckpt is unsafe and was refused.*system"):
        files.run(tmp_path / "m", **{which: path})
    assert not target.exists()
    torch.load(path, weights_only=False)  # the payload is a live one
    assert target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a pointer of Git LFS, which is neither safetensors",
        ),
        (b"<!DOCTYPE html><html>", "is a web page, which is neither safetensors nor"),
        (b"PK\x03\x04 no archive", "is truncated or damaged"),
        (b"\x80\x02garbage", "damaged"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "is truncated or damaged"),
        ((10**15).to_bytes(8, "little") + b'{"a": 1}', "is truncated or damaged"),
    ],
)
def test_a_file_that_is_no_checkpoint(content: bytes, message: str, files: Files, tmp_path: Path) -> None:
    path = tmp_path / "odd.ckpt"
    path.write_bytes(content)
    with pytest.raises(EmtError, match=re.escape(str(path)) + ".*" + message):
        files.run(tmp_path / "m", motion_module=path)


@pytest.mark.parametrize("content", [{"state_dict": {"a": 3}}, [torch.ones(2)], {}, {"a": None}])
def test_a_checkpoint_of_something_else(content: Any, files: Files, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(EmtError, match=r"odd\.ckpt holds (what is no tensor|no tensors)"):
        files.run(tmp_path / "m", motion_module=tmp_path / "odd.ckpt")


@pytest.fixture(scope="module")
def small_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("small")
    state = {"up_blocks.0.motion_modules.0.temporal_transformer.norm.weight": torch.ones(8), "b": torch.ones(3, 4)}
    save_file(state, folder / "a.safetensors")
    torch.save(state, folder / "b.ckpt")
    torch.save(state, folder / "c.ckpt", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_or_altered_file_is_an_error_and_never_a_crash(
    data: st.DataObject, small_checkpoints: list[Path], files: Files, tmp_path: Path
) -> None:
    whole = data.draw(st.sampled_from(small_checkpoints)).read_bytes()
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)), label="length")])
    for _ in range(data.draw(st.integers(0, 3), label="changed bytes") if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "odd"
    path.write_bytes(content)
    with pytest.raises(EmtError, match="odd"):
        files.run(tmp_path / "m", base=path)


# ---------------------------------------------------------------------------------------------------- the output folder


@pytest.mark.parametrize("total", [6, 11])
def test_progress_counts_every_step_to_the_last(total: int, files: Files, tmp_path: Path) -> None:
    """A step for each source, numbered from 0 without a gap, of as many as were announced with the first."""
    reported: list[tuple[str, int, int]] = []
    sources: dict[str, Any] = {"adapter": None}
    if total > 6:
        write_lora(tmp_path / "a.safetensors", LORAS["kohya"], all_weights(files))
        sources = {"dreambooth": files.sd, "vae": files.sd, "loras": [(tmp_path / "a.safetensors", 1.0)] * 2}
    files.run(tmp_path / "m", on_progress=lambda *step: reported.append(step), **sources)
    assert [(done, of) for _, done, of in reported] == [(done, total) for done in range(total + 1)]
    assert reported[-1][0] == "Done"


def test_an_existing_folder_is_kept_without_overwrite(files: Files, tmp_path: Path) -> None:
    random_model(tmp_path / "m")
    with pytest.raises(EmtError, match=r"exists(.|\n)*--overwrite"):
        files.run(tmp_path / "m", adapter=None)
    (tmp_path / "m" / "old").touch()
    state = files.run(tmp_path / "m", adapter=None, overwrite=True).weights
    assert torch.equal(state[f"{TEMPORAL}.weight"], state[f"{TEMPORAL[:-5]}.adapter.to_q.weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert not (tmp_path / "m" / "old").exists()


def test_a_folder_that_is_no_model_is_never_replaced(files: Files, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    with pytest.raises(EmtError, match="is not a model folder and is not replaced"):
        files.run(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_a_source_is_never_replaced_by_what_is_made_of_it(files: Files, tmp_path: Path) -> None:
    base = diffusers_folder(tmp_path / "sd", files.base)
    (base / "model_index.json").write_text("{}")
    with pytest.raises(EmtError, match="holds what is imported"):
        files.run(base, base=base, overwrite=True)
    assert (base / "unet").is_dir()


class Stop(BaseException):
    pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_import_leaves_things_as_they_were(overwrite: bool, files: Files, tmp_path: Path) -> None:
    if overwrite:
        random_model(tmp_path / "m")
    before = sorted(tmp_path.rglob("*"))

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "Flushing to disk":
            assert (tmp_path / ".m.partial" / "unet").is_dir()
            raise Stop

    with pytest.raises(Stop):
        files.run(tmp_path / "m", overwrite=overwrite, on_progress=interrupt)
    assert sorted(tmp_path.rglob("*")) == before


def in_a_child(target: Callable[[], None]) -> int | None:
    """Run in a forked process, which may be killed or limited; its exit code."""

    def run() -> None:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        target()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(timeout=300)
    return child.exitcode


def test_a_killed_import_leaves_no_folder_and_the_next_one_clears_up(files: Files, tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if what == "Flushing to disk":
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(lambda: files.run(tmp_path / "m", on_progress=kill)) == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.lock", ".m.partial"]
    (tmp_path / ".m.partial" / "stale").touch()
    files.run(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert not (tmp_path / "m" / "stale").exists()


def test_a_full_disk_is_one_clear_error(files: Files, tmp_path: Path) -> None:
    def target() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(EmtError, match=r"m cannot be written: .*\nCheck the free space"):
            files.run(tmp_path / "m")

    assert in_a_child(target) == 0
    assert list(tmp_path.iterdir()) == []


def test_two_imports_of_one_folder_do_not_mix(files: Files, tmp_path: Path) -> None:
    def second(what: str, done: int, total: int) -> None:
        if what == "Flushing to disk":
            with pytest.raises(EmtError, match="is being written by another import"):
                files.run(tmp_path / "m")

    files.run(tmp_path / "m", on_progress=second)
    assert (tmp_path / "m" / "model_index.json").is_file()


# ------------------------------------------------------------------------------------------- the card and the program


def test_the_program_imports_and_records_every_source(files: Files, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    gains = write_lora(lora, LORAS["kohya"], all_weights(files))
    save_file(ldm_unet(files.other.unet), tmp_path / "style.safetensors")
    command: list[Any] = ["--base", files.sd, "--motion-module", files.motion_ckpt, "--adapter", files.adapter_ckpt]
    command += ["--dreambooth", tmp_path / "style.safetensors", "--lora", f"{lora}:0.25", "--lora", lora]
    command += ["--tokenizer", files.tokenizer, "--dtype", "fp32", "-o", tmp_path / "m"]
    result = console(tmp_path, "import-weights", *command)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'm'}\n"
    model = Imported(tmp_path / "m")
    name = f"{SPATIAL}.weight"
    torch.testing.assert_close(model.weights[name], files.other.unet[name] + 1.25 * gains[name])
    card = model.card
    for path in (files.sd, files.motion_ckpt, files.adapter_ckpt, tmp_path / "style.safetensors", lora):
        assert f"`{path}` sha256 `{hashlib.sha256(path.read_bytes()).hexdigest()}`" in card
    assert "scale 0.25; 4 layers of the UNet, 1 of the text encoder" in card
    assert "scale 1; 4 layers" in card
    assert "144 trained tensors, up blocks 0, 1, 2, 3" in card
    assert "520 tensors, without mid block, up to 32 frames" in card


def test_the_program_reports_a_bad_file_without_a_traceback(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from emt_cli.app import main

    command: list[Any] = ["emt", "import-weights", "--base", files.sd, "--motion-module", files.adapter_ckpt]
    monkeypatch.setattr(sys, "argv", [str(x) for x in [*command, "--tokenizer", files.tokenizer, "-o", tmp_path / "m"]])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: {files.adapter_ckpt} is an adapter, not a motion module" in captured.err
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------------------------------------------------- random ones


def test_a_random_model_makes_clips_that_follow_the_reference(tmp_path: Path) -> None:
    pipe = MotionTransferPipeline.from_pretrained(random_model(tmp_path / "m", frames=4, height=32, width=32))
    pipe.set_progress_bar_config(disable=True)
    frames = torch.zeros(4, 32, 32, 3, dtype=torch.uint8).numpy()
    for i in range(4):
        frames[i, 8:16, 6 * i : 6 * i + 8] = 255
    moved, still = (
        pipe.generate("a fox, running", pipe.extract_motion(f))[0] for f in (frames, frames[:1].repeat(4, 0))
    )
    assert moved.shape == (4, 32, 32, 3)
    assert moved.std() > 10
    assert (moved != still).mean() > 0.1
    assert (moved != pipe.generate("an owl", pipe.extract_motion(frames))[0]).mean() > 0.1


def test_random_models_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    a, b = random_model(tmp_path / "a"), random_model(tmp_path / "b")
    other = random_model(tmp_path / "c", seed=1)
    name = Path("unet", "diffusion_pytorch_model.safetensors")
    assert (a / name).read_bytes() == (b / name).read_bytes() != (other / name).read_bytes()
    with pytest.raises(EmtError, match="exists"):
        random_model(a)


# ------------------------------------------------------------------------------------------------------- the full size


@pytest.mark.slow
def test_the_full_size_of_stable_diffusion(tmp_path: Path) -> None:
    """686 tensors of the UNet, 560 and more of the motion module; peak memory well under three copies."""
    folder = random_model(tmp_path / "random", size="sd15", dtype=torch.float16)
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    adapter = {k.replace(".adapter.", "."): v for k, v in state.items() if ".adapter." in k or ".scaler." in k}
    motion = {
        k: v for k, v in state.items() if ".motion_modules." in k and ".adapter." not in k and ".scaler." not in k
    }
    unet = {k: v for k, v in state.items() if ".motion_modules." not in k}
    assert (len(unet), len(motion), len(adapter)) == (686, 520, 144)
    text = {
        k.removeprefix("text_model."): v for k, v in load_file(folder / "text_encoder" / "model.safetensors").items()
    }
    assert len(text) == 196
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert len(vae) == 248
    save_file(ldm_unet(unet) | ldm_vae(vae) | ldm_text_encoder(text), tmp_path / "sd15.safetensors")
    torch.save(motion | positions(motion, 32), tmp_path / "mm.ckpt")
    torch.save({"global_step": 1, "state_dict": adapter}, tmp_path / "adapter.ckpt")
    del state, adapter, motion, unet, text, vae
    # Not by `getrusage`: its peak is that of the process before it was this program, a fork of these tests.
    code = (
        "import sys; from emt.backbones.sd15.import_weights import import_weights; t = sys.argv[1]; "
        "import_weights(t + '/m', "
        "base=t + '/sd15.safetensors', motion_module=t + '/mm.ckpt', adapter=t + '/adapter.ckpt', "
        "tokenizer=t + '/random/tokenizer'); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, timeout=1000)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        before, after = (load_file(f / f"{part}.safetensors") for f in (folder, tmp_path / "m"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    # The mapped sources and the model itself, and the libraries: no third copy.
    size = sum(f.stat().st_size for f in (tmp_path / "m").rglob("*.safetensors"))
    assert int(result.stdout) * 1024 < 2 * size + 1.5e9
