"""Addresses and licences of the published files that make a model of motion transfer; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedFile:
    """A file or folder that its authors publish.

    Args:
        option: of `import_weights`, whose value it is.
        address: on the hub.
        title: of what it is.
        licence: as its publisher states it.
        elsewhere: where else it is published.
    """

    option: str
    address: str
    title: str
    licence: str
    elsewhere: str = ""


PUBLISHED = (
    PublishedFile(
        "base", "hf://stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5", "CreativeML Open RAIL-M"
    ),
    PublishedFile("motion_module", "hf://guoyww/animatediff/v3_sd15_mm.ckpt", "AnimateDiff v3", "Apache-2.0"),
    PublishedFile("adapter", "hf://yfcai/EfficientMT/checkpoint.ckpt", "EfficientMT's adapter", "Apache-2.0"),
    PublishedFile(
        "dreambooth",
        "hf://guoyww/animatediff_t2i_backups/realisticVisionV60B1_v51VAE.safetensors",
        "Realistic Vision V6.0 B1",
        "CreativeML Open RAIL-M, with its author's terms",
        "civitai.com/models/4201",
    ),
)
"""The set that EfficientMT's authors used, by the names that their README gives; 9 GB."""
