"""Files of Wan 2.1 as they are published, in every layout, with random weights of small networks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel
from wan21_testing import draw

from emt.backbones.wan21.random_model import byte_tokenizer

State = dict[str, Tensor]
LAYERS = 2
# One head of 128 channels, as in every published Wan, so that files without a configuration can be read.
SIZES = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": LAYERS,
}


def small_parts() -> tuple[WanTransformer3DModel, AutoencoderKLWan, UMT5EncoderModel]:
    """Transformer, VAE and text encoder with random weights."""
    transformer = WanTransformer3DModel(**SIZES)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=2)
    settings = UMT5Config(
        vocab_size=len(byte_tokenizer()),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    text_encoder = UMT5EncoderModel(settings)
    for seed, model in enumerate((transformer, vae, text_encoder)):
        draw(model, seed)
    return transformer, vae, text_encoder


def original_transformer_names() -> list[str]:
    """Names in the original files, as Wan's own code defines the network."""
    linear = ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"]
    names = [f"{m}.{k}" for m in ["patch_embedding", *linear, "head.head"] for k in ("weight", "bias")]
    names.append("head.modulation")
    for i in range(LAYERS):
        names += [f"blocks.{i}.modulation", f"blocks.{i}.norm3.weight", f"blocks.{i}.norm3.bias"]
        for attention in ("self_attn", "cross_attn"):
            names += [f"blocks.{i}.{attention}.{m}.{k}" for m in "qkvo" for k in ("weight", "bias")]
            names += [f"blocks.{i}.{attention}.norm_{m}.weight" for m in "qk"]
        names += [f"blocks.{i}.ffn.{m}.{k}" for m in (0, 2) for k in ("weight", "bias")]
    return names


def original_vae_names() -> list[str]:
    """Names in Wan2.1_VAE.pth: four levels, two residual layers a level on the way down and three on the way up."""

    def residual(path: str, shortcut: bool = False) -> list[str]:
        names = [f"{path}.residual.{i}.gamma" for i in (0, 3)]
        names += [f"{path}.residual.{i}.{k}" for i in (2, 6) for k in ("weight", "bias")]
        return names + ([f"{path}.shortcut.{k}" for k in ("weight", "bias")] if shortcut else [])

    names = [f"conv{i}.{k}" for i in (1, 2) for k in ("weight", "bias")]
    for half in ("encoder", "decoder"):
        names += [f"{half}.conv1.{k}" for k in ("weight", "bias")]
        names += residual(f"{half}.middle.0") + residual(f"{half}.middle.2")
        names.append(f"{half}.middle.1.norm.gamma")
        names += [f"{half}.middle.1.{m}.{k}" for m in ("to_qkv", "proj") for k in ("weight", "bias")]
        names += [f"{half}.head.0.gamma", *(f"{half}.head.2.{k}" for k in ("weight", "bias"))]
    for i, kind in enumerate("RR2RR3RR3RR"):
        path = f"encoder.downsamples.{i}"
        names += residual(path, shortcut=i in (3, 6)) if kind == "R" else []
        names += [f"{path}.resample.1.{k}" for k in ("weight", "bias")] if kind != "R" else []
        names += [f"{path}.time_conv.{k}" for k in ("weight", "bias")] if kind == "3" else []
    for i, kind in enumerate("RRR3RRR3RRR2RRR"):
        path = f"decoder.upsamples.{i}"
        names += residual(path, shortcut=i == 4) if kind == "R" else []
        names += [f"{path}.resample.1.{k}" for k in ("weight", "bias")] if kind != "R" else []
        names += [f"{path}.time_conv.{k}" for k in ("weight", "bias")] if kind == "3" else []
    return names


def _by_original_names(state: State, names: list[str], convert) -> State:
    """A diffusers state under original names; diffusers' own conversion says which is which."""
    new = convert({name: torch.tensor(i) for i, name in enumerate(names)})
    result = {names[int(i)]: state[name].clone() for name, i in new.items()}
    assert len(result) == len(state) == len(names)
    return result


def original_transformer(model: WanTransformer3DModel) -> State:
    """The transformer's weights by original names."""
    return _by_original_names(model.state_dict(), original_transformer_names(), convert_wan_transformer_to_diffusers)


def original_vae(model: AutoencoderKLWan) -> State:
    """The VAE's weights by original names."""
    return _by_original_names(model.state_dict(), original_vae_names(), convert_wan_vae_to_diffusers)


def original_umt5(model: UMT5EncoderModel) -> State:
    """The text encoder's weights by original names."""
    parts = {
        "layer.0.layer_norm": "norm1",
        "layer.0.SelfAttention.q": "attn.q",
        "layer.0.SelfAttention.k": "attn.k",
        "layer.0.SelfAttention.v": "attn.v",
        "layer.0.SelfAttention.o": "attn.o",
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
    }
    state = {
        "token_embedding.weight": model.shared.weight.detach(),
        "norm.weight": model.encoder.final_layer_norm.weight.detach(),
    }
    for name, tensor in model.state_dict().items():
        if match := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name):
            state[f"blocks.{match[1]}.{parts[match[2]]}.weight"] = tensor
    return state


def write_diffusers_folder(folder: Path, shards: bool = False, **index) -> Path:
    """A folder as Wan-AI/Wan2.1-T2V-1.3B-Diffusers is."""
    transformer, vae, text_encoder = small_parts()
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB" if shards else "10GB")
    text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="20KB" if shards else "10GB")
    vae.save_pretrained(folder / "vae")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    described = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]} | index
    (folder / "model_index.json").write_text(json.dumps(described))
    return folder


def write_original_folder(folder: Path) -> Path:
    """A folder as Wan-AI/Wan2.1-T2V-1.3B is."""
    transformer, vae, text_encoder = small_parts()
    folder.mkdir(parents=True)
    save_file(original_transformer(transformer), folder / "diffusion_pytorch_model.safetensors")
    settings = {"model_type": "t2v", "dim": 128, "num_heads": 1, "eps": 1e-6, "_class_name": "WanModel"}
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save(original_umt5(text_encoder), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(original_vae(vae), folder / "Wan2.1_VAE.pth")
    byte_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    return folder
