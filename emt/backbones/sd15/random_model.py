"""Model folders with random weights, for tests and benchmarks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase

from emt.backbones.sd15.stable_diffusion import animatediff_scheduler, clip_config, vae_config
from emt.backbones.sd15.unet import MotionTransferUNet
from emt.checkpoints import allocate
from emt.model_folder import model_card, new_folder
from emt.pipeline import MotionTransferPipeline

_PIPELINE_DEFAULTS = ("frames", "height", "width", "steps", "guidance", "reference_timestep", "sampler")
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "unet": {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_heads": 2,
            "motion_attention_heads": 2,
            "norm_num_groups": 8,
        },
        "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        "text_encoder": {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        "defaults": {"frames": 8, "height": 64, "width": 64, "steps": 4},
    },
    "sd15": {
        "unet": {},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "text_encoder": {
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "vocab_size": 49408,
        },
        "defaults": {},
    },
}


def random_model(
    folder: str | Path, *, size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any
) -> Path:
    """Write a model folder with random weights, for tests and benchmarks: the same ones for the same arguments.

    Args:
        folder: to write; must not exist or be empty.
        size: "tiny" makes a clip in well under a second on one CPU core; "sd15" has every width of Stable Diffusion
            1.5 (1.5 billion weights), with a vocabulary of single bytes and a few merges.
        dtype: of the stored weights.
        seed: of the weights.
        **sizes: arguments of `MotionTransferUNet` and defaults of `MotionTransferPipeline` (frames, height, width,
            steps, guidance, reference_timestep, sampler) that differ from the size's.

    Raises:
        EmtError: if the folder is in use.
        TypeError: for an unknown argument.
    """
    chosen = _SIZES[size]
    defaults = {k: sizes.pop(k) for k in _PIPELINE_DEFAULTS if k in sizes}
    unet = allocate(lambda: MotionTransferUNet(**chosen["unet"] | sizes), dtype)
    vae_sizes = vae_config(latent_channels=unet.config.in_channels, **chosen["vae"])
    vae = allocate(lambda: AutoencoderKL.from_config(vae_sizes), dtype)
    with new_folder(Path(folder), overwrite=False) as partial:
        words = byte_tokenizer(partial / "tokenizer")
        text = {"vocab_size": len(words), "hidden_size": unet.config.cross_attention_dim} | chosen["text_encoder"]
        text_encoder = allocate(lambda: CLIPTextModel(CLIPTextConfig.from_dict(clip_config(**text))), dtype)
        generator = torch.Generator().manual_seed(seed)
        for model in (unet, vae, text_encoder):
            draw_weights(model, generator)
        scheduler = animatediff_scheduler("epsilon")
        pipe = MotionTransferPipeline(vae, text_encoder, words, unet, scheduler, **chosen["defaults"] | defaults)
        pipe.save_pretrained(partial)
        card = model_card("Random weights", f"Nothing here is trained: size `{size}`, seed {seed}.")
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


@torch.no_grad()
def draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights of variance 1/inputs in place; norms get weight 1, all biases are 0."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(generator=generator).div_(math.sqrt(math.prod(p.shape[1:])))
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
        if name.endswith("scaler.spatial_convs.2.bias"):
            p.fill_(5.0)  # sigmoid(x − 5) around one half: the reference must show in the result


def byte_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Write and open a tokenizer of CLIP's kind that knows single bytes and a few merges, and so spells any prompt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    merges = ["i n", "n g</w>", "t h", "th e</w>", "e r", "e r</w>", "a n", "an d</w>", "o n</w>", "r e", "s t"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)
