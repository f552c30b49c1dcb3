"""Limits and costs of the UNet, from its configuration alone; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emt.backbone import Facts, counts

#: Arithmetic of a pass for each parameter and latent position: 35.3 TFLOP for a batch of two with guidance, 1.3 G
#: parameters and 16 frames of 512×512.
_FLOP = 0.204
#: Memory at the peak for each pixel of all frames and channel of the first level, in fp16: 11.1 GiB in all for the same
#: clip with 320 channels, of which 2.8 GiB are weights.
_ACTIVATION_BYTES = 6.6


def facts(config: Mapping[str, Any]) -> Facts:
    """Limits and costs of a network with this configuration.

    Raises:
        ValueError: a value is no positive number, or list of them.
    """
    widths = counts(config, "block_out_channels", [320, 640, 1280, 1280])
    fused = config.get("fusion_blocks")
    return Facts(
        max_frames=counts(config, "motion_max_frames", [32])[0],
        frame_step=1,
        grid_step=1,
        even_step=2 ** (len(widths) - 1),
        flop=_FLOP,
        activation_bytes=_ACTIVATION_BYTES * widths[0],
        windows=True,
        # It compares the attention of the second up block, which is read where the adapter takes it.
        motion_guidance=len(widths) > 1 if fused is None else isinstance(fused, list | tuple) and 1 in fused,
    )
