"""Reading of AnimateDiff's motion modules, out of whatever file or folder holds one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emt.backbones.sd15.checkpoint_kinds import ADAPTER, MOTION_MODULE, SINGLE_FILE, describe, one_prefix, wrong_kind
from emt.backbones.sd15.network import without_positions
from emt.backbones.sd15.stable_diffusion import GROUPS, HEADS, Component
from emt.checkpoints import Origin, State, naming_file, read_config, read_weights, weights_names
from emt.errors import EmtError
from emt.hub import OnFetch, folder_instead, locate

# A network with motion modules, and diffusers' container of them alone.
_CLASSES = ("MotionAdapter", "UNetMotionModel", "MotionTransferUNet")
_SUBFOLDERS = ("motion_adapter/", "unet/", "")
_MODULE = re.compile(r"(?P<prefix>.*?)(?P<name>((down|up)_blocks\.\d+|mid_block)\.motion_modules\.\d+\..+)")

# diffusers' names within a motion module, and the published ones.
_NAMES = {
    "norm1": "norms.0",
    "norm2": "norms.1",
    "norm3": "ff_norm",
    "attn1": "attention_blocks.0",
    "attn2": "attention_blocks.1",
}


def published_motion_name(name: str) -> str:
    """`…motion_modules.N.` with diffusers' names → with the published ones, which pass as they are."""
    match = re.fullmatch(r"(.*motion_modules\.\d+\.)(?!temporal_transformer\.)(.+)", name)
    if not match:
        return name
    rest = re.sub(r"(?<=transformer_blocks\.0\.)(\w+)", lambda m: _NAMES.get(m[0], m[0]), match[2])
    return f"{match[1]}temporal_transformer.{rest}"


def read_motion_module(given: str | Path, on_fetch: OnFetch | None = None) -> tuple[Component, Origin]:
    """Read a motion module: AnimateDiff's file, a diffusers `MotionAdapter`, or a network that has one.

    Raises:
        EmtError: if it is missing, damaged or of another kind, or its position encoding is not AnimateDiff's.
    """
    path = locate(given, "motion module", _folder_files, on_fetch=on_fetch)
    files = []
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        folder = next((path / sub for sub in _SUBFOLDERS if _is_motion_config(path / sub / "config.json")), path)
        if not (folder / "config.json").is_file():
            raise folder_instead(path, "Give a motion module's file, or the folder of a diffusers MotionAdapter.")
    settings: dict[str, Any] = {}
    if path.is_dir() or _is_motion_config(folder / "config.json"):
        settings, config_file = read_config(folder / "config.json")
        files.append(config_file)
    checkpoint, read = read_weights(folder if path.is_dir() else path)
    files += read
    weights = read[0] if len(read) == 1 else folder
    state, unread = _extract(checkpoint.state, weights)
    positions = []
    for name, tensor in state.items():
        if name.endswith(".pe"):
            if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point():
                odd = f"{weights}: {name} is of shape {tuple(tensor.shape)} and {tensor.dtype}"
                raise EmtError(odd, "Download it again.")
            positions.append(tensor.shape[-2])
    config = {
        "motion_mid_block": any(name.startswith("mid_block.") for name in state),
        "motion_max_frames": min(positions, default=_number(settings, "motion_max_seq_length", 32, files[0])),
        "motion_attention_heads": _number(settings, "motion_num_attention_heads", HEADS, files[0]),
    }
    if (groups := _number(settings, "motion_norm_num_groups", GROUPS, files[0])) != GROUPS:
        raise EmtError(
            f"{files[0]} has motion_norm_num_groups {groups}, supported is {GROUPS}",
            "Give a motion module of AnimateDiff v1, v2 or v3.",
        )
    state = naming_file(weights, without_positions, state)
    mid = "with" if config["motion_mid_block"] else "without"
    note = f"{len(state)} tensors, {mid} mid block, up to {config['motion_max_frames']} frames"
    dtypes = Counter(tensor.dtype for tensor in state.values())
    if (dtype := dtypes.most_common(1)[0][0]).itemsize == 1:
        note += f"; stored as {str(dtype).removeprefix('torch.')}, with its rounding"
    origin = Origin("motion module", str(given), files, note, [*checkpoint.dropped, *unread])
    return Component(config, state, str(weights)), origin


def _folder_files(names: Sequence[str]) -> list[str]:
    """The files to read of a folder that holds a motion module, among all its names."""
    for sub in _SUBFOLDERS:
        weights = weights_names(n[len(sub) :] for n in names if n.startswith(sub))
        if f"{sub}config.json" in names and weights:
            return [f"{sub}config.json", *(f"{sub}{name}" for name in weights)]
    return []


def _is_motion_config(config: Path) -> bool:
    return config.is_file() and read_config(config)[0].get("_class_name") in _CLASSES


def _number(settings: dict[str, Any], name: str, default: int, where: Path) -> int:
    value = settings.get(name, default)
    if not isinstance(value, int) or not 0 < value < 10_000:
        raise EmtError(f"{where} has {name} {value!r:.40}", "Allowed is a whole number; download it again.")
    return value


def _extract(state: State, path: Path) -> tuple[State, list[str]]:
    """The motion modules by published names, without prefixes, and the keys of all else."""
    matches = {name: match for name in state if (match := _MODULE.fullmatch(name))}
    kind = describe(state)
    # Beside an adapter by its own names are the backbone's projections; by the published names it replaces them.
    own = kind == ADAPTER and any(".adapter." in name for name in state)
    odd = next((name for name in state if "motion_module" in name or "temporal_transformer" in name), None)
    if not matches and odd and kind.startswith(("of an unknown kind", "a UNet", MOTION_MODULE)):
        raise EmtError(
            f"{path} names the layers of a motion module in another way: {odd}",
            "Expected are names such as down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight.",
        )
    if not matches or not (own or kind in (MOTION_MODULE, SINGLE_FILE)):
        raise wrong_kind(path, kind, MOTION_MODULE)
    prefix = one_prefix(path, MOTION_MODULE, Counter(match["prefix"] for match in matches.values()))
    taken = {
        name: published_motion_name(match["name"])
        for name, match in matches.items()
        if match["prefix"] == prefix and ".adapter." not in name and ".scaler." not in name
    }
    return {taken[name]: state[name] for name in taken}, [name for name in state if name not in taken]
