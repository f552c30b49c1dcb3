"""Reading checkpoints: files, folders and hub ids, their kinds and names, and where they came from."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from torch import Tensor, nn

from emt.errors import EmtError, first_line
from emt.storage import sha256_of

State = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


@dataclass
class Checkpoint:
    """The tensors of a file by name, and a safetensors file's own metadata."""

    state: State
    metadata: dict[str, str]


@dataclass(frozen=True)
class Source:
    """Where a part of a model came from, as its model card records it.

    Args:
        kind: what was given, such as "motion module".
        name: the path or hub id as given.
        files: (path, sha256) of every file read.
        note: what was taken from it.
    """

    kind: str
    name: str
    files: tuple[tuple[str, str], ...]
    note: str


@dataclass
class Origin:
    """A source before its files are hashed."""

    kind: str
    name: str
    files: list[Path]
    note: str

    def hashed(self) -> Source:
        """The source, with the sha256 of every file."""
        return Source(self.kind, self.name, tuple((str(path), sha256_of(path)) for path in self.files), self.note)


def locate(
    given: str | Path, kind: str, download: Callable[..., Any] | None = None, hint: str = "", **options: Any
) -> Path:
    """The path of what was given, downloaded if it is a hub id and `download` is there to do so."""
    path = Path(given)
    if path.exists():
        return path
    is_file = path.suffix in (".safetensors", ".ckpt", ".pt", ".bin")
    if download is None or is_file or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(given)):
        allowed = "a file" if download is None else "a folder, a hub id such as owner/name, or a file"
        raise EmtError(f"the {kind} {given} does not exist", hint or f"Give {allowed}.")
    try:
        return Path(download(str(given), **options))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise EmtError(
            f"the {kind} {given} is no path here and cannot be fetched from the hub: {first_line(error)}",
            hint or f"Check the name and the network, or give a folder that `hf download {given}` made elsewhere.",
        ) from error


def read_config(path: Path) -> tuple[dict[str, Any], Path]:
    """A JSON configuration, and its path.

    Raises:
        EmtError: if it is missing or damaged.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EmtError(
            f"{path.parent} has no {path.name}",
            "Give a folder in diffusers layout: unet, vae, text_encoder and tokenizer, each with its configuration.",
        ) from error
    except (OSError, ValueError) as error:
        raise EmtError(f"{path} cannot be read: {first_line(error)}", "Download it again.") from error
    if not isinstance(config, dict):
        raise EmtError(f"{path} is not a configuration: it holds a {type(config).__name__}", "Download it again.")
    return config, path


def weights_file(folder: Path) -> Path:
    """The file of weights in a folder of diffusers or transformers; safetensors and full precision first.

    Raises:
        EmtError: if there is none.
    """
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for suffix in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".ckpt"):
        for stem in stems:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise EmtError(
        f"{folder} has no weights: neither {' nor '.join(f'{stem}.safetensors' for stem in stems)} nor a .bin",
        "Download the folder again; weights split over several files are not read.",
    )


def read_checkpoint(path: Path, wanted: str | None = None) -> Checkpoint:
    """The tensors of a .safetensors, .ckpt, .pt or .bin file, mapped from disk where the format allows.

    Tensors under "state_dict" are taken out of it, and a common `module.` prefix off their names.

    Raises:
        EmtError: if the file is missing, damaged, unsafe, holds something else than tensors, or is not the kind
            `wanted` (one of `_KINDS`).
    """
    metadata: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if head[8:9] == b"{":
            with safe_open(path, framework="pt") as tensors:
                metadata = tensors.metadata() or {}
                content: Any = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        elif head[:2] == b"PK" or head[:1] == b"\x80":
            # Files of before PyTorch 1.6 are bare pickles, which cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=head[:2] == b"PK")
        else:
            what = (
                "is empty" if not head else f"is neither safetensors nor a PyTorch checkpoint: it begins {head[:24]!r}"
            )
            raise EmtError(
                f"{path} {what}", "Download it again; a page or a Git LFS pointer may have been saved instead."
            )
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        if culprit is None:
            raise EmtError(
                f"{path} is damaged, or was not written by torch.save: it is no pickle of tensors", "Download it again."
            ) from error
        raise EmtError(
            f"{path} is unsafe and was refused: besides tensors it holds {culprit[1]}, and could run code",
            "Give the .safetensors version of this file.",
        ) from error
    except FileNotFoundError as error:
        raise EmtError(f"{path} does not exist", "Check the path.") from error
    except EmtError:
        raise
    except Exception as error:  # damaged bytes fail in any way at all in the parsers of pickles and archives
        raise EmtError(f"{path} is truncated or damaged: {first_line(error)}", "Download it again.") from error

    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise EmtError(f"{path} holds no tensors by name but a {type(content).__name__}", "Give a state dict.")
    # Counters and AnimateDiff's own settings lie beside the tensors of some files.
    content = {k: v for k, v in content.items() if k not in ("global_step", "epoch", "animatediff_config")}
    others = [
        f"{k!r} ({type(v).__name__})" for k, v in content.items() if not isinstance(k, str) or not isinstance(v, Tensor)
    ]
    if others or not content:
        what = f"holds what is no tensor: {', '.join(others)}" if others else "holds no tensors"
        raise EmtError(f"{path} {what}", "Give a file that holds the weights by name.")
    state = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    if len(state) < len(content):
        twice = sorted(name for name in content if f"module.{name}" in content)
        raise EmtError(
            f"{path} has keys with and without `module.`: {', '.join(twice)}", "Give a file with one of them."
        )
    if wanted is not None and (kind := _kind(state)) != wanted:
        raise EmtError(f"{path} is {kind}, not {wanted}", _KINDS[wanted])
    return Checkpoint(state, metadata)


# diffusers' names within a motion module, and the published ones.
_MOTION_NAMES = {
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
    rest = re.sub(r"(?<=transformer_blocks\.0\.)(\w+)", lambda m: _MOTION_NAMES.get(m[0], m[0]), match[2])
    return f"{match[1]}temporal_transformer.{rest}"


_KINDS = {
    "Stable Diffusion 1.5 in the original layout": "Give a file with keys such as model.diffusion_model.…",
    "a motion module": "Give AnimateDiff's mm_sd_v15_v2.ckpt or v3_sd15_mm.ckpt, or a diffusers MotionAdapter.",
    "an adapter": "Give EfficientMT's checkpoint, or one of emt train.",
    "a LoRA": "Give a LoRA of Stable Diffusion 1.5 or an AnimateDiff motion LoRA.",
}


def _kind(state: Mapping[str, Tensor]) -> str:
    """What a file holds, in the words of `_KINDS` and others, by its keys."""
    if any(re.search(r"lora_|lora\.|\.hada_|\.lokr_", name) for name in state):
        return "a LoRA"
    if any(name.startswith("model.diffusion_model.") for name in state):
        if any(name.startswith(("conditioner.embedders.", "cond_stage_model.model.")) for name in state):
            return "a Stable Diffusion of another version (2 or XL)"
        return "Stable Diffusion 1.5 in the original layout"
    if any(".scaler." in name for name in state):
        return "an adapter"
    if any(".motion_modules." in name for name in state):
        return "a UNet with motion modules" if "conv_in.weight" in state else "a motion module"
    if any(name.startswith("down_blocks.") for name in state):
        return "a UNet in diffusers layout"
    if any(name.startswith(("encoder.", "first_stage_model.")) for name in state):
        return "a VAE"
    return f"of an unknown kind (it begins with {min(state)})"


def naming_file(path: Path, check: Callable[[State], State], state: State) -> State:
    """`check(state)`, with the file named in its error."""
    try:
        return check(state)
    except EmtError as error:
        raise EmtError(f"{path}: {error.problem}", error.hint) from error


def check_keys(part: str, given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    """Raise an `EmtError` that names every missing, unexpected and mis-shaped key of `part`, if there is one."""
    problems = [f"missing: {k} {tuple(wanted[k])}" for k in sorted(wanted.keys() - given.keys())]
    problems += [f"unexpected: {k} {tuple(given[k].shape)}" for k in sorted(given.keys() - wanted.keys())]
    problems += [
        f"wrong shape: {k} is {tuple(given[k].shape)}, expected {tuple(wanted[k])}"
        for k in sorted(wanted.keys() & given.keys())
        if given[k].shape != wanted[k]
    ]
    if problems:
        raise EmtError(
            f"the {part} does not fit this network, {len(problems)} keys differ:\n  " + "\n  ".join(problems),
            "Give weights of the same architecture (SD 1.5 with an AnimateDiff motion module).",
        )


def allocate(build: Callable[[], M], dtype: torch.dtype) -> M:
    """Build a model with parameters allocated in `dtype` but not initialised: drawing gigabytes takes long."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = build()
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=dtype)))
    return model.eval()
