"""Limits and costs of the transformer, from its configuration alone; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emt.backbone import Facts, counts

_HEADS = (("num_attention_heads", 12), ("attention_head_dim", 128))


def default_reference_blocks(layers: int) -> range:
    """Blocks that take the reference where none are given: 4 to 18 of 30, as many in proportion of others.

    Guidance reads motion best in the middle: in block 14 (FastVMT) or 15 of 30 and 20 of 42 (DiTFlow, Pondaven et al.
    2025, arXiv 2412.07776); the last 65% can be left out (DeT); the deepest third is about appearance.
    """
    return _in_proportion(4, 19, layers)


def trained_reference_blocks(layers: int) -> range:
    """Blocks that an adapter to be trained has if none are given: 8 to 17 of 30, as many in proportion of others.

    In the small transformer's ablations the intervals of a third in the middle do not tell it from all of
    `default_reference_blocks`, though it reads lower throughout; it has two thirds of the cost (docs/wan.md).
    """
    return _in_proportion(8, 18, layers)


def _in_proportion(first: int, end: int, layers: int) -> range:
    """Blocks of a network of `layers`, at least one, that lie where `first` to `end` do among 30."""
    begin = round(layers * first / 30)
    return range(begin, max(round(layers * end / 30), begin + 1))


def facts(config: Mapping[str, Any]) -> Facts:
    """Limits and costs of a network with this configuration, by its arithmetic; its memory was not measured.

    Raises:
        ValueError: a value is no positive number, or list of them.
    """
    heads, head_channels = (counts(config, name, [n])[0] for name, n in _HEADS)
    channels, layers = heads * head_channels, counts(config, "num_layers", [30])[0]
    inner, scaler = counts(config, "ffn_dim", [8960])[0], counts(config, "scaler_channels", [256])[0]
    down = counts(config, "patch_size", [1, 2, 2])[1]
    frames = counts(config, "frames_per_latent", [4])[0]
    blocks = config.get("reference_blocks")
    blocks = list(default_reference_blocks(layers) if blocks is None else blocks)
    references = len(blocks)
    # Motion guidance reads best in the middle of the network (DiTFlow: block 15 of 30, 20 of 42).
    middle = min(blocks, key=lambda block: abs(block - layers // 2)) if blocks else None
    positions = down * down * frames  # of a token
    # Two samples' residual stream, its norm and projections, and the feed-forward layer; a reference's keys, values and
    # features.
    token_bytes = 2 * (24 * channels + 4 * inner) + references * (6 * channels + 2 * scaler)
    return Facts(
        max_frames=counts(config, "max_frames", [81])[0],
        frame_step=frames,
        grid_step=down,
        even_step=down,
        flop=2 / positions,
        activation_bytes=token_bytes / (64 * positions),
        attention_flop=4 * channels * layers / positions**2,
        first_frames=counts(config, "first_frames", [1])[0],
        windows=True,
        motion_guidance=middle is not None,
        guided_blocks=() if middle is None else (middle,),
    )
