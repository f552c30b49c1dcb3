"""The published file kinds at a small width, for the tests that import them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from published import SMALL, draw, small_states
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from emt.backbones.sd15.import_weights import import_weights
from emt.backbones.sd15.layers import sinusoidal_positions
from emt.backbones.sd15.random_model import byte_tokenizer
from emt.pipeline import MotionTransferPipeline

State = dict[str, Tensor]

WIDTHS, TEXT_WIDTH = SMALL["channels"], SMALL["cross_attention_dim"]
VAE_SIZES: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT_SIZES: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 600,
    "hidden_act": "quick_gelu",
}


# ------------------------------------------------------------------------------------- the original layout, by names


def ldm_unet(state: State) -> State:
    """A UNet's weights by the names of the original Stable Diffusion code (two residual blocks a level)."""
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    stem = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def rename(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        if module in stem:
            return f"{stem[module]}.{leaf}"
        match = re.fullmatch(r"(down|mid|up)_blocks?\.?(\d*)\.(\w+)\.(\d+)\.(.+)", name)
        assert match, name
        where, kind, layer, rest = match[1], match[3], int(match[4]), match[5]
        level = int(match[2] or 0)
        if kind == "resnets":
            part, _, leaf = rest.rpartition(".")
            rest = f"{resnet[part]}.{leaf}"
        if where == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{3 * level + 3}.0.op.{rest.rpartition('.')[2]}"
        if kind == "upsamplers":
            attended = f"up_blocks.{level}.attentions.0.norm.weight" in state
            return f"output_blocks.{3 * level + 2}.{1 + attended}.{rest}"
        block = f"input_blocks.{1 + 3 * level + layer}" if where == "down" else f"output_blocks.{3 * level + layer}"
        return f"{block}.{int(kind == 'attentions')}.{rest}"

    return {f"model.diffusion_model.{rename(name)}": tensor for name, tensor in state.items()}


def ldm_vae(state: State) -> State:
    levels = len(VAE_SIZES["block_out_channels"])
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    result = {}
    for name, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"\.resnets\.", ".block.", name)
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if match := re.fullmatch(r"(.+)mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            name = f"{match[1]}mid.attn_1.{attention[match[2]]}.{match[3]}"
            if tensor.ndim == 2:  # 1×1 convolutions there
                tensor = tensor[:, :, None, None]
        result[f"first_stage_model.{name}"] = tensor
    return result


def ldm_text_encoder(state: State) -> State:
    prefix = "cond_stage_model.transformer.text_model."
    return {f"{prefix}{name}": tensor for name, tensor in state.items()} | {
        f"{prefix}embeddings.position_ids": torch.arange(77)[None]
    }


def ldm_file(parts: Parts) -> State:
    return ldm_unet(parts.unet) | ldm_vae(parts.vae) | ldm_text_encoder(parts.text_encoder)


# --------------------------------------------------------------------------------------------------- the source files


class Parts:
    """The weights of a small Stable Diffusion, by diffusers' names."""

    def __init__(self, seed: int) -> None:
        backbone, _ = small_states() if seed == 0 else (draw(SMALL["backbone_keys"], seed), None)
        self.unet = {k: v for k, v in backbone.items() if ".motion_modules." not in k}
        with torch.device("meta"):
            vae, text_encoder = AutoencoderKL(**VAE_SIZES), CLIPTextModel(CLIPTextConfig(**TEXT_SIZES))
        self.vae = draw({k: list(v.shape) for k, v in vae.named_parameters()}, seed + 10)
        self.text_encoder = draw(
            {k.removeprefix("text_model."): list(v.shape) for k, v in text_encoder.named_parameters()}, seed + 20
        )


def with_prefix(model: torch.nn.Module, state: State) -> State:
    """Weights of a text encoder by the names of the installed version of transformers."""
    own = [name for name, _ in model.named_parameters()]
    return {name: state[name.removeprefix("text_model.")] for name in own}


class Files:
    """The published files at a small width."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.other = Parts(0), Parts(5)
        backbone, self.adapter = small_states()
        self.motion = {k: v for k, v in backbone.items() if ".motion_modules." in k}
        self.sd = folder / "sd15.safetensors"
        save_file(ldm_file(self.base), self.sd)
        self.motion_ckpt = folder / "v3_sd15_mm.ckpt"
        torch.save(self.motion, self.motion_ckpt)
        self.adapter_ckpt = folder / "adapter.ckpt"
        torch.save({"global_step": 30000, "state_dict": self.adapter}, self.adapter_ckpt)
        self.tokenizer = folder / "tokenizer"
        byte_tokenizer(self.tokenizer).save_pretrained(self.tokenizer)

    def run(self, output: Path, **changes: Any) -> Imported:
        """Import with all the defaults below but the changes."""
        arguments: dict[str, Any] = {
            "base": self.sd,
            "motion_module": self.motion_ckpt,
            "adapter": self.adapter_ckpt,
            "tokenizer": self.tokenizer,
            "dtype": "fp32",
        }
        report = import_weights(output, **arguments | changes)
        assert report.folder == output
        return Imported(output)

    def weights(self, **changes: State) -> State:
        """The network's weights by its own names: what an import must store."""
        parts = {"unet": self.base.unet, "motion": self.motion, "adapter": self.adapter} | changes
        return parts["unet"] | parts["motion"] | own_names(parts["adapter"])


class Imported:
    """A model folder: its stored weights, or its parts opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        self.card = (folder / "README.md").read_text()
        self.config = json.loads((folder / "unet" / "config.json").read_text())

    def open(self) -> MotionTransferPipeline:
        return MotionTransferPipeline.from_pretrained(self.folder)


def own_names(adapter: State) -> State:
    return {k.replace(".to_", ".adapter.to_"): v for k, v in adapter.items()}


def assert_same_weights(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


# ------------------------------------------------------------------------------------------------- other containers


def diffusers_folder(folder: Path, parts: Parts, *, old_names: bool = False) -> Path:
    """Stable Diffusion as diffusers stores it; with `old_names`, as it did when SD 1.5 was released."""
    unet = UNet2DConditionModel(
        block_out_channels=WIDTHS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=SMALL["heads"],
    )
    unet.load_state_dict(parts.unet)
    vae = AutoencoderKL(**VAE_SIZES)
    vae.load_state_dict(parts.vae)
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_SIZES))
    text_encoder.load_state_dict(with_prefix(text_encoder, parts.text_encoder), strict=False)
    unet.save_pretrained(folder / "unet", safe_serialization=not old_names)
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    DDIMScheduler(prediction_type="v_prediction" if old_names else "epsilon").save_pretrained(folder / "scheduler")
    byte_tokenizer(folder / "tokenizer").save_pretrained(folder / "tokenizer")
    if old_names:
        (folder / "tokenizer" / "tokenizer.json").unlink()  # vocab.json and merges.txt alone
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
        new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = {
            re.sub(r"attentions\.0\.(to_[qkv]|to_out\.0)", lambda m: f"attentions.0.{new_to_old[m[1]]}", k): v
            for k, v in parts.vae.items()
        }
        save_file(state, folder / "vae" / "diffusion_pytorch_model.safetensors")
        state = ldm_text_encoder(parts.text_encoder)
        state = {k.removeprefix("cond_stage_model.transformer."): v for k, v in state.items()}
        save_file(state, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    return folder


def mid_block(motion: State) -> State:
    """The mid block's module of AnimateDiff v2: another of the lowest level's."""
    last = f"down_blocks.{len(WIDTHS) - 1}."
    first = {k: v for k, v in motion.items() if k.startswith(f"{last}motion_modules.0.")}
    return {k.replace(last, "mid_block."): v + 0.01 for k, v in first.items()}


def positions(motion: State, frames: int) -> State:
    """The position encodings that AnimateDiff's files carry, (1, frames, channels)."""
    return {
        k.replace("to_q.weight", "pos_encoder.pe"): sinusoidal_positions(frames, v.shape[0])[None]
        for k, v in motion.items()
        if k.endswith("to_q.weight")
    }


def motion_adapter(motion: State, mid: bool) -> MotionAdapter:
    """diffusers' container of the same weights, by its own names."""
    adapter = MotionAdapter(block_out_channels=WIDTHS, use_motion_mid_block=mid, motion_max_seq_length=32)
    names = {
        ".temporal_transformer.": ".",
        ".attention_blocks.0.": ".attn1.",
        ".attention_blocks.1.": ".attn2.",
        ".norms.0.": ".norm1.",
        ".norms.1.": ".norm2.",
        ".ff_norm.": ".norm3.",
    }
    state = {}
    for name, tensor in motion.items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    missing, unexpected = adapter.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith(".pos_embed.pe") for name in missing)
    return adapter


# ---------------------------------------------------------------------------------------------------- LoRAs and damage

SPATIAL = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
OUT = "up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0"
CONV = "mid_block.resnets.0.conv1"
POINTWISE = "mid_block.attentions.0.proj_in"
TEMPORAL = "up_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q"
TEMPORAL_OUT = "down_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_out.0"
TEXT = "encoder.layers.1.self_attn.q_proj"


def kohya(name: str, text: bool = False) -> str:
    return ("lora_te_text_model_" if text else "lora_unet_") + name.replace(".", "_")


def drop(state: State, key: str) -> State:
    return {k: v for k, v in state.items() if k != key}


class Payload:
    """Pickles into a call that creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.target}",)
