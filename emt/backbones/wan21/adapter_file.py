"""The adapter alone in a file: what is trained, without the backbone that it was trained on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from emt.backbones.wan21.adapter import Adapter
from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.checkpoints import Origin, State, read_checkpoint, read_config, sizes_of_weights
from emt.errors import EmtError, first_line
from emt.hub import locate
from emt.storage import apply_umask

_OPTIONS = ("reference_blocks", "reference_neighbours", "adapter_rank", "scaler_channels")


@dataclass
class AdapterWeights:
    """Weights by their names in the transformer, and the arguments of the transformer that they go with."""

    state: State
    options: dict[str, Any]
    origin: Origin


def save_adapter(model: WanMotionTransferTransformer, path: str | Path) -> None:
    """Write what is trained of a transformer as a safetensors file."""
    state = {name: p.detach().contiguous() for name, p in model.adapter_parameters()}
    save_file(state, path, metadata(model))
    apply_umask(Path(path))


def metadata(model: WanMotionTransferTransformer) -> dict[str, str]:
    """Metadata of an adapter's safetensors file: arguments of the transformer that it goes with."""
    return {"format": "pt", "emt_adapter": json.dumps({name: model.config[name] for name in _OPTIONS})}


def read_adapter(given: str | Path) -> AdapterWeights:
    """Read what `save_adapter` wrote, or the adapter of a model folder.

    Raises:
        EmtError: if there is no adapter of this network in it.
    """
    path = locate(given, "adapter")
    files = [path]
    if path.is_dir():
        config, config_file = read_config(path / "unet" / "config.json")
        files = [config_file, *sorted((path / "unet").glob("*.safetensors"))]
    checkpoints = [read_checkpoint(file) for file in files if file.suffix != ".json"]
    state = {
        name: t for c in checkpoints for name, t in c.state.items() if re.match(r"blocks\.\d{1,4}\.adapter\.", name)
    }
    blocks = sorted({int(name.split(".")[1]) for name in state})
    first = f"blocks.{blocks[0]}.adapter." if blocks else ""
    give = "Give the model folder that emt train wrote, or a file of its adapter."
    if not blocks:
        raise EmtError(f"{given} has no adapter of Wan: no blocks.N.adapter.…", give)
    with sizes_of_weights(f"{given} has no adapter of Wan", give):
        options: dict[str, Any] = {
            "reference_blocks": blocks,
            "adapter_rank": state[f"{first}query.down.weight"].shape[0],
            "scaler_channels": state[f"{first}scaler.own.weight"].shape[0],
        }
    stored = config if path.is_dir() else _stored_options(checkpoints[0].metadata, path)
    options["reference_neighbours"] = neighbours = stored.get("reference_neighbours")
    if neighbours is not None and (type(neighbours) is not int or neighbours < 0):
        raise EmtError(f"{given} has reference_neighbours {neighbours!r:.40}", "Give the file that emt train wrote.")
    note = f"{len(state)} trained tensors, blocks {blocks[0]} to {blocks[-1]}"
    return AdapterWeights(state, options, Origin("adapter", str(given), files, note))


def _stored_options(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    try:
        options = json.loads(metadata.get("emt_adapter", "{}"))
    except (ValueError, RecursionError) as error:
        raise EmtError(f"{path} has an emt_adapter that is no JSON: {first_line(error)}", "Copy it again.") from error
    if not isinstance(options, dict):
        raise EmtError(f"{path} has an emt_adapter that is no JSON object", "Copy it again.")
    return options


def initial_adapter(model: WanMotionTransferTransformer, seed: int = 0) -> State:
    """Weights that training starts from, for a transformer that may be without memory (on "meta")."""
    config = model.config
    channels = config.num_attention_heads * config.attention_head_dim
    state: State = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i, block in enumerate(model.blocks):
            if block.adapter is not None:
                new = Adapter(channels, config.num_attention_heads, config.adapter_rank, config.scaler_channels)
                state |= {f"blocks.{i}.adapter.{name}": tensor for name, tensor in new.state_dict().items()}
    return state
