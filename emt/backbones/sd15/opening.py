"""Opening of a model folder for making clips, without diffusers and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from emt.backbones.sd15.autoencoder import Autoencoder
from emt.backbones.sd15.clip import ACTIVATIONS, TextEncoder, Tokenizer
from emt.backbones.sd15.network import MotionTransferNetwork
from emt.parts import Config, open_network

_CLASSES = {
    "unet": ("MotionTransferUNet",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": Tokenizer.CLASSES,
}
#: Entries of the network's configuration that no shape of a weight depends on: with another number clips are wrong.
_NOT_IN_WEIGHTS = {"attention_heads", "motion_attention_heads", "norm_num_groups"}


def open_parts(folder: Path, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any] | None:
    """Text encoder, tokenizer, network and VAE of a model folder; None if they are of other kinds than these.

    Args:
        folder: of the model.
        index: content of its `model_index.json`.
        dtype: of the weights.

    Raises:
        EmtError: a part has not the weights that its file holds.
        OSError: a file is missing.
        ValueError: a configuration is damaged.
    """
    for name, classes in _CLASSES.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in classes:
            return None
    if not (folder / "tokenizer" / "tokenizer.json").is_file():  # a vocabulary and merges, which transformers builds on
        return None
    if not Autoencoder.builds(Config.read(folder / "vae" / "config.json")):
        return None
    if missing := _NOT_IN_WEIGHTS - Config.read(folder / "unet" / "config.json").keys():
        raise ValueError(f"{folder / 'unet' / 'config.json'} does not say {', '.join(sorted(missing))}")
    if Config.read(folder / "text_encoder" / "config.json").get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        return None
    return {
        "vae": open_network(Autoencoder, folder / "vae", dtype),
        "text_encoder": open_network(TextEncoder, folder / "text_encoder", dtype),
        "tokenizer": Tokenizer.read(folder / "tokenizer"),
        "unet": open_network(MotionTransferNetwork, folder / "unet", dtype),
    }
