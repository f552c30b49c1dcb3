"""From the published files to one model folder, and folders with random weights for tests and benchmarks.

Every file is read without copying it into memory where its format allows, brought to the published names, checked
key by key, and copied once into the network in the type that is stored.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.models.modeling_utils import no_init_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase

from emt.errors import EmtError
from emt.pipeline import MotionTransferPipeline
from emt.unet import MotionTransferUNet, check_keys, without_positions

DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}

State = dict[str, Tensor]
Progress = Callable[[str, int, int], None]
M = TypeVar("M", bound=nn.Module)


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


@dataclass(frozen=True)
class ImportReport:
    """What `import_weights` wrote, and from what."""

    folder: Path
    sources: tuple[Source, ...]


# ------------------------------------------------------------------------------------------------------------ import


def import_weights(
    output: str | Path,
    *,
    base: str | Path,
    motion_module: str | Path,
    dreambooth: str | Path | None = None,
    adapter: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    tokenizer: str | Path | None = None,
    dtype: str = "fp16",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ImportReport:
    """Make one model folder, which `MotionTransferPipeline.from_pretrained` opens, from the published files.

    The folder appears under its name only once it is complete; an import that is killed leaves `.NAME.partial` beside
    it, which the next one replaces.

    Args:
        output: the folder to write.
        base: Stable Diffusion 1.5: a diffusers folder, a hub id, or one file in the original layout, whose plain (not
            `model_ema`) weights are used.
        motion_module: AnimateDiff's .ckpt, or a diffusers `MotionAdapter` (folder, file or hub id).
        dreambooth: one file in the original layout; its UNet replaces the base's, and so do its VAE and text encoder
            if it has them.
        adapter: EfficientMT's checkpoint, whole network or only what is trained. None starts the adapter from the
            motion module's projections.
        loras: files and scales, merged into the UNet, motion module and text encoder; not into the adapter.
        tokenizer: folder or hub id; None takes the base folder's, or `DEFAULT_TOKENIZER` if the base is one file.
        dtype: of the stored weights, "fp16" or "fp32".
        overwrite: replace the output folder, if it is a model folder.
        on_progress: called with what is being done, steps done and steps in all.

    Raises:
        EmtError: for a file that is missing, damaged, unsafe or of another kind, naming it and every key that does
            not fit; for an output folder that exists; and if the folder cannot be written.
    """
    output = Path(output)
    if dtype not in DTYPES:
        raise EmtError(f"there is no type {dtype!r} to store weights in", f"Allowed: {', '.join(DTYPES)}.")
    total = 6 + len(loras) + sum(x is not None for x in (dreambooth, adapter))
    done = 0

    def step(what: str) -> None:
        nonlocal done
        if on_progress:
            on_progress(what, done, total)
        done += 1

    inputs = [base, motion_module, dreambooth, adapter, tokenizer, *(path for path, _ in loras)]
    with _new_folder(output, overwrite, inputs) as partial:
        pipe, origins = _assemble(base, motion_module, dreambooth, adapter, loras, tokenizer, dtype, step)
        step("Hashing the sources")
        sources = tuple(origin.hashed() for origin in origins)
        step("Writing the model folder")
        pipe.save_pretrained(partial)
        (partial / "README.md").write_text(_import_card(sources, dtype), encoding="utf-8")
        step("Flushing to disk")
    if on_progress:
        on_progress("Done", total, total)
    return ImportReport(output, sources)


def _assemble(
    base: str | Path,
    motion_module: str | Path,
    dreambooth: str | Path | None,
    adapter: str | Path | None,
    loras: Sequence[tuple[str | Path, float]],
    tokenizer: str | Path | None,
    dtype: str,
    step: Callable[[str], None],
) -> tuple[MotionTransferPipeline, list[_Origin]]:
    """Read every source and put the model together; mapped files and merged copies are let go on return."""
    step("Reading the base")
    model = _read_base(base)
    origins = [_Origin("base", str(base), model.files, "UNet, VAE, text encoder")]
    if dreambooth is not None:
        step("Reading the DreamBooth model")
        origins.append(_apply_dreambooth(model, dreambooth))
    step("Reading the motion module")
    motion, origin = _read_motion_module(motion_module)
    origins.append(origin)
    config = model.unet.config | motion.config
    trained: State | None = None
    if adapter is not None:
        step("Reading the adapter")
        trained, blocks, origin = _read_adapter(adapter)
        origins.append(origin)
        if blocks != list(range(len(config["block_out_channels"]))):
            config["fusion_blocks"] = blocks
    else:
        origins.append(_Origin("adapter", "none", [], "starts from the motion module's projections, not trained"))
    stored = DTYPES[dtype]
    unet = _build(lambda: MotionTransferUNet(**config), stored, model.unet.where)
    _check_unet(unet, model.unet, motion, trained, adapter)
    _check_together(model)
    text_config = CLIPTextConfig.from_dict(model.text_encoder.config)
    words, words_origin = _read_tokenizer(tokenizer, model, text_config)

    merge = _Merge(unet=model.unet.state | motion.state, text_encoder=model.text_encoder.state)
    for path, scale in loras:
        step(f"Reading LoRA {Path(path).name}")
        origins.append(merge.read(path, scale))

    step("Assembling the model")
    merge.apply(stored)
    if trained is None:
        _reset_scalers(unet)
    unet.load_published(merge.states["unet"], trained)
    vae = _build(lambda: AutoencoderKL.from_config(model.vae.config), stored, model.vae.where)
    _fill(vae, model.vae.state, f"VAE of {model.vae.where}")
    text_encoder = _build(lambda: CLIPTextModel(text_config), stored, model.text_encoder.where)
    _fill(text_encoder, merge.states["text_encoder"], f"text encoder of {model.text_encoder.where}")
    for name, part in (("UNet", unet), ("VAE", vae), ("text encoder", text_encoder)):
        _check_finite(name, part, dtype)
    scheduler = _scheduler(model.prediction_type)
    return MotionTransferPipeline(vae, text_encoder, words, unet, scheduler), [*origins, words_origin]


def parse_lora(value: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE` → path and scale, 1 unless given.

    Raises:
        EmtError: if the scale is no finite number.
    """
    path, colon, scale = value.rpartition(":")
    if not colon or Path(value).exists():
        return Path(value), 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise EmtError(f"--lora {value}: the scale {scale!r} is not a number", "Write --lora FILE or --lora FILE:0.8.")
    return Path(path), number


# ---------------------------------------------------------------------------------------------------- random weights

_PIPELINE_DEFAULTS = ("frames", "height", "width", "steps", "guidance", "reference_timestep")
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
            steps, guidance, reference_timestep) that differ from the size's.

    Raises:
        EmtError: if the folder is in use.
        TypeError: for an unknown argument.
    """
    chosen = _SIZES[size]
    defaults = {k: sizes.pop(k) for k in _PIPELINE_DEFAULTS if k in sizes}
    unet = _allocate(lambda: MotionTransferUNet(**chosen["unet"] | sizes), dtype)
    vae_config = _vae_config(latent_channels=unet.config.in_channels, **chosen["vae"])
    vae = _allocate(lambda: AutoencoderKL.from_config(vae_config), dtype)
    with _new_folder(Path(folder), overwrite=False) as partial:
        words = byte_tokenizer(partial / "tokenizer")
        text = {"vocab_size": len(words), "hidden_size": unet.config.cross_attention_dim} | chosen["text_encoder"]
        text_encoder = _allocate(lambda: CLIPTextModel(CLIPTextConfig.from_dict(_text_config(**text))), dtype)
        generator = torch.Generator().manual_seed(seed)
        for model in (unet, vae, text_encoder):
            _draw(model, generator)
        scheduler = _scheduler("epsilon")
        pipe = MotionTransferPipeline(vae, text_encoder, words, unet, scheduler, **chosen["defaults"] | defaults)
        pipe.save_pretrained(partial)
        card = _card("Random weights", f"Nothing here is trained: size `{size}`, seed {seed}.")
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


@torch.no_grad()
def _draw(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of variance 1/inputs, unit norms, no biases."""
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


# ------------------------------------------------------------------------------------------------- Stable Diffusion

# What Stable Diffusion 1.5 is, beyond its widths: the files in the original layout carry no configuration.
_HEADS = 8
_GROUPS = 32
_VAE_SCALE = 0.18215
# Settings of diffusers' `UNet2DConditionModel` that the network here has built in.
_UNET_BUILT_IN: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "in_channels": (4,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "out_channels": (4,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),
    "use_linear_projection": (False,),
}
# Training state that files in the original layout carry along; nothing of it is a weight of the model.
_LDM_EXTRAS = re.compile(
    r"model_ema\.|(betas|alphas_cumprod|alphas_cumprod_prev|logvar|lvlb_weights|scale_factor)$"
    r"|(sqrt_|log_one_minus_|posterior_)\w+$"
)
_DEPRECATED_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class _Part:
    """One network as read: its configuration, its weights by published names, and the files' names for errors."""

    config: dict[str, Any]
    state: State
    where: str


@dataclass
class _StableDiffusion:
    unet: _Part
    vae: _Part
    text_encoder: _Part
    files: list[Path]
    folder: Path | None = None
    prediction_type: str = "epsilon"


def _read_base(base: str | Path) -> _StableDiffusion:
    path = _local(base, "base", DiffusionPipeline.download, safety_checker=None, feature_extractor=None)
    if path.is_dir():
        return _read_diffusers_folder(path)
    parts = _read_ldm_file(path)
    missing = [name for name in ("VAE", "text encoder") if name not in parts]
    if missing:
        raise EmtError(
            f"{path} has no {' and no '.join(missing)}",
            "Give it as --dreambooth, over a --base that is complete.",
        )
    return _StableDiffusion(parts["UNet"], parts["VAE"], parts["text encoder"], [path])


def _read_diffusers_folder(folder: Path) -> _StableDiffusion:
    parts, files = {}, []
    for name in ("unet", "vae", "text_encoder"):
        config, config_file = _read_config(folder / name / "config.json")
        weights = _weights_file(folder / name)
        parts[name] = _Part(config, _read_checkpoint(weights).state, str(weights))
        files += [config_file, weights]
    parts["unet"].config = _unet_config(parts["unet"].config, str(folder / "unet" / "config.json"))
    # Weights of SD 1.5 are older than the names of the VAE's attention in diffusers.
    parts["vae"].state = {
        re.sub(r"(?<=\.attentions\.0\.)\w+", lambda m: _DEPRECATED_VAE_NAMES.get(m[0], m[0]), name): tensor
        for name, tensor in parts["vae"].state.items()
    }
    parts["text_encoder"].state = _text_state(parts["text_encoder"].state)
    model = _StableDiffusion(parts["unet"], parts["vae"], parts["text_encoder"], files, folder)
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler, config_file = _read_config(folder / "scheduler" / "scheduler_config.json")
        model.prediction_type = scheduler.get("prediction_type", "epsilon")
        files.append(config_file)
    return model


def _unet_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `MotionTransferUNet` from the configuration of a diffusers UNet."""
    wrong = [
        f"{name} is {config[name]!r}, supported is {allowed[0]!r}"
        for name, allowed in _UNET_BUILT_IN.items()
        if name in config and config[name] not in allowed
    ]
    down, up = config.get("down_block_types", []), config.get("up_block_types", [])
    attended = [i for i, kind in enumerate(down) if kind == "CrossAttnDownBlock2D"]
    mirrored = [kind == "CrossAttnUpBlock2D" for kind in reversed(up)]
    if [i in attended for i in range(len(down))] != mirrored or {*down} - {"CrossAttnDownBlock2D", "DownBlock2D"}:
        wrong.append(f"the blocks are {[*down, *up]!r}")
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", _HEADS)
    heads = {*heads} if isinstance(heads, (list, tuple)) else {heads}
    if len(heads) > 1:
        wrong.append(f"attention_head_dim is {sorted(heads)!r}, supported is one number of heads")
    if wrong:
        raise EmtError(
            f"{where} does not describe a UNet of Stable Diffusion 1.5:\n  " + "\n  ".join(wrong),
            "Give Stable Diffusion 1.5 or a fine-tune of it as --base.",
        )
    widths = list(config["block_out_channels"])
    return {
        "block_out_channels": widths,
        "layers_per_block": config["layers_per_block"],
        "cross_attention_dim": config["cross_attention_dim"],
        "attention_heads": heads.pop(),
        "norm_num_groups": config.get("norm_num_groups", _GROUPS),
    } | ({} if attended == list(range(len(widths) - 1)) else {"attention_levels": attended})


def _read_ldm_file(path: Path) -> dict[str, _Part]:
    """The parts of a single file in the original layout ("UNet", "VAE", "text encoder"): those that it has."""
    state = _read_checkpoint(path, "Stable Diffusion 1.5 in the original layout").state
    prefixes = {"UNet": "model.diffusion_model.", "VAE": "first_stage_model.", "text encoder": "cond_stage_model."}
    groups: dict[str, State] = {name: {} for name in prefixes}
    strays = {}
    for key, tensor in state.items():
        for name, prefix in prefixes.items():
            if key.startswith(prefix):
                groups[name][key] = tensor
                break
        else:
            if not _LDM_EXTRAS.match(key):
                strays[key] = tensor
    check_keys(f"file {path}", strays, {})
    read = {"UNet": _ldm_unet, "VAE": _ldm_vae, "text encoder": _ldm_text_encoder}
    parts = {}
    for name, group in groups.items():
        if not group:
            continue
        try:
            config, part = read[name](group)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise EmtError(
                f"the {name} in {path} does not have the layout of Stable Diffusion 1.5: {error}",
                "Give Stable Diffusion 1.5 or a fine-tune of it; other versions do not fit the motion modules.",
            ) from error
        # The conversions pass over what they do not know; nothing may be lost in silence. A converted tensor is the
        # stored one or the start of it.
        used = {tensor.data_ptr() for tensor in part.values()}
        lost = {k: t for k, t in group.items() if t.data_ptr() not in used and not k.endswith(".position_ids")}
        check_keys(f"{name} in {path}", lost, {})
        parts[name] = _Part(config, part, str(path))
    return parts


def _ldm_unet(state: State) -> tuple[dict[str, Any], State]:
    prefix = "model.diffusion_model.input_blocks."
    inputs = 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))
    levels = 1 + sum(key.endswith(".0.op.weight") for key in state)
    if inputs % levels or inputs < 2 * levels:
        raise ValueError(f"{inputs} input blocks over {levels} levels")
    starts = [1 + level * (inputs // levels) for level in range(levels)]
    attended = [i for i, start in enumerate(starts) if f"{prefix}{start}.1.proj_in.weight" in state]
    layers = inputs // levels - 1
    config = {
        "block_out_channels": [state[f"{prefix}{start}.0.in_layers.2.weight"].shape[0] for start in starts],
        "layers_per_block": layers,
        "cross_attention_dim": next(t.shape[1] for k, t in state.items() if k.endswith("attn2.to_k.weight")),
        "attention_heads": _HEADS,
        "norm_num_groups": _GROUPS,
    } | ({} if attended == list(range(levels - 1)) else {"attention_levels": attended})
    return config, convert_ldm_unet_checkpoint(state, {"layers_per_block": layers})


def _ldm_vae(state: State) -> tuple[dict[str, Any], State]:
    prefix = "first_stage_model."
    levels = sum(bool(re.fullmatch(r".*\.encoder\.down\.\d+\.block\.0\.conv1\.weight", key)) for key in state)
    widths = [state[f"{prefix}encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    config = _vae_config(
        block_out_channels=widths,
        layers_per_block=sum(bool(re.fullmatch(r".*\.encoder\.down\.0\.block\.\d+\.conv1\.weight", k)) for k in state),
        latent_channels=state[f"{prefix}post_quant_conv.weight"].shape[0],
    )
    return config, convert_ldm_vae_checkpoint(state, config)


def _ldm_text_encoder(state: State) -> tuple[dict[str, Any], State]:
    converted = _text_state(convert_ldm_clip_checkpoint(state))
    vocabulary, width = converted["embeddings.token_embedding.weight"].shape
    config = _text_config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_attention_heads=max(width // 64, 1),
        num_hidden_layers=sum(key.endswith(".mlp.fc1.weight") for key in converted),
        intermediate_size=converted["encoder.layers.0.mlp.fc1.weight"].shape[0],
        max_position_embeddings=converted["embeddings.position_embedding.weight"].shape[0],
    )
    return config, converted


def _vae_config(*, block_out_channels: Sequence[int], **sizes: Any) -> dict[str, Any]:
    levels = len(block_out_channels)
    return {
        "block_out_channels": list(block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": _GROUPS,
        "sample_size": 512,
        "scaling_factor": _VAE_SCALE,
    } | sizes


def _text_config(**sizes: Any) -> dict[str, Any]:
    # The token ids are those of SD 1.5's own configuration; only the pooled output, not used here, reads them.
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 77} | tokens | sizes


def _text_state(state: Mapping[str, Tensor]) -> State:
    """Weights of a text encoder without the prefix that versions of transformers differ in, and without indices."""
    return {
        name.removeprefix("text_model."): tensor for name, tensor in state.items() if not name.endswith(".position_ids")
    }


def _apply_dreambooth(model: _StableDiffusion, dreambooth: str | Path) -> _Origin:
    path = _local(dreambooth, "DreamBooth model")
    if path.is_dir():
        raise EmtError(
            f"the DreamBooth model {path} is a folder", "Give one .safetensors or .ckpt file, or the folder as --base."
        )
    parts = _read_ldm_file(path)
    model.unet = parts["UNet"]
    model.vae = parts.get("VAE", model.vae)
    model.text_encoder = parts.get("text encoder", model.text_encoder)
    kept = [name for name in ("VAE", "text encoder") if name not in parts]
    note = ", ".join(parts) + " replace the base's"
    return _Origin(
        "DreamBooth model", str(dreambooth), [path], note + (f"; it has no {' or '.join(kept)}" if kept else "")
    )


def _scheduler(prediction_type: str) -> DDIMScheduler:
    # AnimateDiff's: linear betas, where Stable Diffusion has them linear in the square root.
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        steps_offset=1,
        clip_sample=False,
        prediction_type=prediction_type,
    )


def _read_tokenizer(
    given: str | Path | None, model: _StableDiffusion, config: CLIPTextConfig
) -> tuple[PreTrainedTokenizerBase, _Origin]:
    name: str | Path = given if given is not None else DEFAULT_TOKENIZER
    if given is None and model.folder is not None:
        name = model.folder / "tokenizer"
    hint = (
        "Give --tokenizer FOLDER: the tokenizer folder of any Stable Diffusion 1.5 in diffusers layout, or download it "
        f"where there is a network: hf download {DEFAULT_TOKENIZER} tokenizer.json tokenizer_config.json vocab.json "
        "merges.txt --local-dir FOLDER"
    )
    files = ["tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json"]
    folder = _local(name, "tokenizer", snapshot_download, hint, allow_patterns=files)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EmtError(f"the tokenizer {name} cannot be loaded: {_first_line(error)}", hint) from error
    if len(tokenizer) > config.vocab_size:
        raise EmtError(
            f"the tokenizer {name} has {len(tokenizer)} tokens, the text encoder knows {config.vocab_size}", hint
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    read = [path for path in sorted(folder.iterdir()) if any(path.match(pattern) for pattern in files)]
    return tokenizer, _Origin("tokenizer", str(name), read, f"{len(tokenizer)} tokens")


# --------------------------------------------------------------------------------------- motion module and adapter

# diffusers' names within a motion module, and the published ones.
_MOTION_NAMES = {
    "norm1": "norms.0",
    "norm2": "norms.1",
    "norm3": "ff_norm",
    "attn1": "attention_blocks.0",
    "attn2": "attention_blocks.1",
}


def _published_motion_name(name: str) -> str:
    """`…motion_modules.N.` with diffusers' names → with the published ones, which pass as they are."""
    match = re.fullmatch(r"(.*motion_modules\.\d+\.)(?!temporal_transformer\.)(.+)", name)
    if not match:
        return name
    rest = re.sub(r"(?<=transformer_blocks\.0\.)(\w+)", lambda m: _MOTION_NAMES.get(m[0], m[0]), match[2])
    return f"{match[1]}temporal_transformer.{rest}"


def _read_motion_module(motion_module: str | Path) -> tuple[_Part, _Origin]:
    path = _local(
        motion_module, "motion module", snapshot_download, allow_patterns=["config.json", "diffusion_pytorch_model.*"]
    )
    files = []
    folder = path if path.is_dir() else path.parent
    settings: dict[str, Any] = {}
    if path.is_dir() or _is_motion_adapter(folder / "config.json"):
        settings, config_file = _read_config(folder / "config.json")
        files.append(config_file)
    weights = _weights_file(path) if path.is_dir() else path
    files.append(weights)
    checkpoint = _read_checkpoint(weights, "a motion module")
    state = {_published_motion_name(name): tensor for name, tensor in checkpoint.state.items()}
    positions = [tensor.shape[-2] for name, tensor in state.items() if name.endswith(".pe")]
    config = {
        "motion_mid_block": any(name.startswith("mid_block.") for name in state),
        "motion_max_frames": min(positions, default=settings.get("motion_max_seq_length", 32)),
        "motion_attention_heads": settings.get("motion_num_attention_heads", _HEADS),
    }
    if settings.get("motion_norm_num_groups", _GROUPS) != _GROUPS:
        raise EmtError(
            f"{folder / 'config.json'} has motion_norm_num_groups {settings['motion_norm_num_groups']}, "
            f"supported is {_GROUPS}",
            "Give a motion module of AnimateDiff v1, v2 or v3.",
        )
    part = _Part(config, _named_in(weights, without_positions, state), str(weights))
    mid = "with" if config["motion_mid_block"] else "without"
    note = f"{len(part.state)} tensors, {mid} mid block, up to {config['motion_max_frames']} frames"
    return part, _Origin("motion module", str(motion_module), files, note)


def _is_motion_adapter(config: Path) -> bool:
    return config.is_file() and _read_config(config)[0].get("_class_name") == "MotionAdapter"


def _read_adapter(adapter: str | Path) -> tuple[State, list[int], _Origin]:
    """The trained weights by published names, and the up blocks that they are of."""
    path = _local(adapter, "adapter")
    if path.is_dir():
        raise EmtError(f"the adapter {path} is a folder", "Give the adapter's .ckpt or .safetensors file.")
    state = _named_in(path, without_positions, _read_checkpoint(path, "an adapter").state)
    blocks = sorted({int(m[1]) for name in state if (m := re.match(r"up_blocks\.(\d+)\..*\.scaler\.", name))})
    # The network here names the trained projections apart from the backbone's, which are beside them in a whole one.
    own = {name.replace(".adapter.", ".") for name in state if ".adapter." in name}
    state = {name.replace(".adapter.", "."): tensor for name, tensor in state.items() if name not in own}
    whole = "conv_in.weight" in state
    count = len(state)
    if whole:
        pattern = re.compile(r"up_blocks\.(\d+)\.motion_modules\..*(\.attention_blocks\.\d+\.to_[qkv]\.|\.scaler\.)")
        state = {n: t for n, t in state.items() if (m := pattern.match(n)) and int(m[1]) in blocks}
    note = f"{len(state)} trained tensors, up blocks {', '.join(map(str, blocks))}"
    if whole:
        note += f"; {count - len(state)} tensors of the frozen network not used"
    return state, blocks, _Origin("adapter", str(adapter), [path], note)


def _check_unet(
    unet: MotionTransferUNet, base: _Part, motion: _Part, adapter: State | None, adapter_path: str | Path | None
) -> None:
    """Compare the keys of each source with its share of the network, so that an error names the file."""
    shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    trained = {name for name, _ in unet.adapter_parameters()}
    backbone = {name: shape for name, shape in shapes.items() if name not in trained}
    spatial = {name: shape for name, shape in backbone.items() if ".motion_modules." not in name}
    check_keys(f"UNet of {base.where}", base.state, spatial)
    temporal = {name: shape for name, shape in backbone.items() if ".motion_modules." in name}
    check_keys(f"motion module {motion.where}", motion.state, temporal)
    if adapter is not None:
        wanted = {name.replace(".adapter.", "."): shapes[name] for name in trained}
        check_keys(f"adapter {adapter_path}", adapter, wanted)


def _check_together(model: _StableDiffusion) -> None:
    text, unet = model.text_encoder, model.unet
    if text.config["hidden_size"] != unet.config["cross_attention_dim"]:
        raise EmtError(
            f"the text encoder of {text.where} has width {text.config['hidden_size']}, "
            f"the UNet of {unet.where} reads {unet.config['cross_attention_dim']}",
            "Give a text encoder and a UNet of the same model.",
        )
    if model.vae.config.get("latent_channels", 4) != 4:
        raise EmtError(
            f"the VAE of {model.vae.where} has {model.vae.config['latent_channels']} latent channels, the UNet has 4",
            "Give the VAE of a Stable Diffusion 1.5.",
        )


# -------------------------------------------------------------------------------------------------------------- LoRA

# The names of a layer's halves: kohya, PEFT, diffusers, and the attention processors of diffusers and AnimateDiff.
_LORA_HALF = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<a>down|up|A|B)(?:\.default)?|\.lora(?:_linear_layer)?\.(?P<b>down|up)"
    r"|_lora\.(?P<c>down|up))\.weight"
)
_LORA_ALPHA = re.compile(r"(?P<module>.+?)(?:_lora)?\.alpha")
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class _LoraLayer:
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


@dataclass
class _Merge:
    """LoRA layers by the weight that they change, over the states of the networks.

    All layers of a weight are added to it in float32 and rounded once.
    """

    unet: State
    text_encoder: State
    layers: dict[tuple[str, str], list[tuple[Tensor, Tensor, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states: dict[str, State] = {"unet": self.unet, "text_encoder": self.text_encoder}
        self._modules = {
            part: {n.removesuffix(".weight") for n, t in state.items() if n.endswith(".weight") and t.ndim > 1}
            for part, state in self.states.items()
        }
        # kohya writes underscores for dots, which cannot be undone without the names.
        self._flat = {part: {n.replace(".", "_"): n for n in names} for part, names in self._modules.items()}

    def read(self, lora: str | Path, scale: float) -> _Origin:
        """Add the layers of a file, times `scale`.

        Raises:
            EmtError: naming every key that is not half of a layer, belongs to no weight or does not fit it.
        """
        path = _local(lora, "LoRA")
        checkpoint = _read_checkpoint(path, "a LoRA")
        files = [path]
        metadata = json.loads(checkpoint.metadata.get("lora_adapter_metadata", "{}"))
        peft_config = path.parent / "adapter_config.json"
        if path.name.startswith("adapter_model.") and peft_config.is_file():
            metadata, _ = _read_config(peft_config)
            files.append(peft_config)

        found: dict[str, _LoraLayer] = {}
        problems = []
        for key, tensor in checkpoint.state.items():
            if match := _LORA_HALF.fullmatch(key):
                layer = found.setdefault(match["module"], _LoraLayer())
                if (match["a"] or match["b"] or match["c"]) in ("down", "A"):
                    layer.down = tensor
                else:
                    layer.up = tensor
            elif match := _LORA_ALPHA.fullmatch(key):
                found.setdefault(match["module"], _LoraLayer()).alpha = tensor.item()
            else:
                problems.append(f"unexpected: {key} {tuple(tensor.shape)}")

        counts = dict.fromkeys(self.states, 0)
        for module, layer in found.items():
            target = self._target(module)
            if target is None:
                problems.append(f"no such weight in the model: {module}")
            elif layer.down is None or layer.up is None:
                problems.append(f"missing: the {'down' if layer.down is None else 'up'} half of {module}")
            else:
                part, name = target
                weight = self.states[part][name]
                if not _lora_fits(layer.down, layer.up, weight):
                    problems.append(
                        f"wrong shape: {module} is {tuple(layer.up.shape)} × {tuple(layer.down.shape)}, "
                        f"the weight {tuple(weight.shape)}"
                    )
                    continue
                alpha = layer.alpha if layer.alpha is not None else _alpha(metadata, part, module, layer.down.shape[0])
                factor = scale * alpha / layer.down.shape[0]
                self.layers.setdefault(target, []).append((layer.down, layer.up, factor))
                counts[part] += 1
        if problems:
            raise EmtError(
                f"the LoRA {path} does not fit this model, {len(problems)} keys differ:\n  " + "\n  ".join(problems),
                "Give a LoRA of Stable Diffusion 1.5 or an AnimateDiff motion LoRA; LoHa, LoKr and DoRA are not read.",
            )
        note = f"scale {scale:g}; {counts['unet']} layers of the UNet, {counts['text_encoder']} of the text encoder"
        return _Origin("LoRA", str(lora), files, note)

    def _target(self, module: str) -> tuple[str, str] | None:
        """The network and the weight that a layer of this name changes."""
        module = module.removeprefix("base_model.model.").removeprefix("module.")
        for prefix, part in (
            ("lora_unet_", "unet"),
            ("lora_te_text_model_", "text_encoder"),
            ("lora_te_", "text_encoder"),
        ):
            if module.startswith(prefix):
                name = self._flat[part].get(module.removeprefix(prefix))
                return (part, f"{name}.weight") if name else None
        module = _published_motion_name(module.replace(".processor.", ".").removeprefix("unet."))
        text = module.removeprefix("text_encoder.").removeprefix("text_model.")
        head, _, last = text.rpartition(".")
        for part, name in (
            ("unet", module),
            ("unet", f"{module}.0"),  # `to_out` for `to_out.0`
            ("text_encoder", text),
            ("text_encoder", f"{head}.{_TEXT_NAMES.get(last, last)}"),
        ):
            if name in self._modules[part]:
                return part, f"{name}.weight"
        return None

    def apply(self, dtype: torch.dtype) -> None:
        """Replace every changed weight by the sum, in `dtype`."""
        for (part, name), layers in self.layers.items():
            weight = self.states[part][name].float()
            for down, up, factor in layers:
                delta = factor * (up.float().flatten(1) @ down.float().flatten(1))
                weight = weight + delta.reshape(weight.shape)
            self.states[part][name] = weight.to(dtype)


def _lora_fits(down: Tensor, up: Tensor, weight: Tensor) -> bool:
    # A linear layer's LoRA may serve a 1×1 convolution and the other way round; `up` is always pointwise.
    pointwise = math.prod(up.shape[2:]) == 1
    inner = math.prod(down.shape[2:]) == math.prod(weight.shape[2:]) and down.shape[1] == weight.shape[1]
    return pointwise and inner and up.shape[1] == down.shape[0] and up.shape[0] == weight.shape[0]


def _alpha(metadata: Mapping[str, Any], part: str, module: str, rank: int) -> float:
    """Alpha of a layer in the terms of PEFT's configuration; a file without one has its scale in the weights."""
    settings = {key.removeprefix(f"{part}."): value for key, value in metadata.items()}
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


# ------------------------------------------------------------------------------------------------------------- files


@dataclass
class _Checkpoint:
    state: State
    metadata: dict[str, str]


@dataclass
class _Origin:
    """A source before its files are hashed."""

    kind: str
    name: str
    files: list[Path]
    note: str

    def hashed(self) -> Source:
        return Source(self.kind, self.name, tuple((str(path), _sha256(path)) for path in self.files), self.note)


def _local(
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
            f"the {kind} {given} is no path here and cannot be fetched from the hub: {_first_line(error)}",
            hint or f"Check the name and the network, or give a folder that `hf download {given}` made elsewhere.",
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _read_config(path: Path) -> tuple[dict[str, Any], Path]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EmtError(
            f"{path.parent} has no {path.name}",
            "Give a folder in diffusers layout: unet, vae, text_encoder and tokenizer, each with its configuration.",
        ) from error
    except (OSError, ValueError) as error:
        raise EmtError(f"{path} cannot be read: {_first_line(error)}", "Download it again.") from error
    if not isinstance(config, dict):
        raise EmtError(f"{path} is not a configuration: it holds a {type(config).__name__}", "Download it again.")
    return config, path


def _weights_file(folder: Path) -> Path:
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for suffix in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".ckpt"):
        for stem in stems:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise EmtError(
        f"{folder} has no weights: neither {' nor '.join(f'{stem}.safetensors' for stem in stems)} nor a .bin",
        "Download the folder again; weights split over several files are not read.",
    )


def _read_checkpoint(path: Path, wanted: str | None = None) -> _Checkpoint:
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
        raise EmtError(f"{path} is truncated or damaged: {_first_line(error)}", "Download it again.") from error

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
    return _Checkpoint(state, metadata)


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


def _named_in(path: Path, check: Callable[[State], State], state: State) -> State:
    """`check(state)`, with the file named in its error."""
    try:
        return check(state)
    except EmtError as error:
        raise EmtError(f"{path}: {error.problem}", error.hint) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ models


def _build(build: Callable[[], M], dtype: torch.dtype, where: str) -> M:
    try:
        return _allocate(build, dtype)
    except (ValueError, TypeError) as error:
        raise EmtError(
            f"{where} describes no model that can be built: {error}", "Give Stable Diffusion 1.5."
        ) from error


def _allocate(build: Callable[[], M], dtype: torch.dtype) -> M:
    """A model with its parameters allocated in `dtype`, not initialised: gigabytes would be drawn to be overwritten."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = build()
    empty = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.named_parameters()}
    model.load_state_dict(empty, strict=False, assign=True)
    return model.eval()


@torch.no_grad()
def _fill(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy weights into a model of diffusers or transformers after checking every key."""
    parameters = _text_state(dict(model.named_parameters()))
    check_keys(what, state, {name: p.shape for name, p in parameters.items()})
    for name, p in parameters.items():
        p.copy_(state[name])


def _reset_scalers(unet: MotionTransferUNet) -> None:
    """Initialise the scalers as PyTorch does, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in unet.fusion_modules().values():
            for conv in module.temporal_transformer.transformer_blocks[0].scaler.spatial_convs:
                conv.reset_parameters()


def _check_finite(what: str, model: nn.Module, dtype: str) -> None:
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise EmtError(
            f"{len(bad)} weights of the {what} are not finite in {dtype}: {', '.join(bad)}",
            "Store it with --dtype fp32." if dtype == "fp16" else "The source is damaged: download it again.",
        )


# ------------------------------------------------------------------------------------------------------------ output


@contextmanager
def _new_folder(output: Path, overwrite: bool, inputs: Sequence[str | Path | None] = ()) -> Iterator[Path]:
    """A folder to write into, which takes the name `output` once it is complete and on disk.

    Raises:
        EmtError: if `output` exists and may not be replaced, if another process is writing it, or if writing fails.
    """
    output = output.resolve()
    in_use = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if in_use and not overwrite:
        raise EmtError(f"{output} exists", "Give another -o FOLDER, or --overwrite to replace it.")
    if in_use and not (output / "model_index.json").is_file():
        raise EmtError(f"{output} is not a model folder and is not replaced", "Give another -o FOLDER.")
    inside = [
        str(x) for x in inputs if x is not None and Path(x).exists() and output in [p := Path(x).resolve(), *p.parents]
    ]
    if in_use and inside:
        raise EmtError(f"{output} holds what is imported: {', '.join(inside)}", "Give another -o FOLDER.")
    partial, replaced = (output.with_name(f".{output.name}.{kind}") for kind in ("partial", "replaced"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        # The lock goes with the process that holds it: what a killed import left can be told from one at work.
        lock = os.open(partial, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EmtError(f"{output} is being written by another import", "Wait for it to end.") from error
            try:
                _empty(partial)
                yield partial
                _flush(partial)
                if in_use:
                    shutil.rmtree(replaced, ignore_errors=True)
                    output.rename(replaced)
                partial.rename(output)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                if replaced.exists() and not output.exists():
                    replaced.rename(output)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
            _fsync(output.parent)
        finally:
            os.close(lock)
    except (OSError, SafetensorError) as error:
        raise EmtError(
            f"{output} cannot be written: {_first_line(error)}", "Check the free space and permissions."
        ) from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _import_card(sources: Sequence[Source], dtype: str) -> str:
    lines = [
        f"Stable Diffusion 1.5 with motion modules and the motion transfer adapter, stored as {dtype} by "
        "`emt import-weights`. The weights keep the licences of their sources.",
        "",
        "## Sources",
        "",
    ]
    for source in sources:
        lines.append(f"- **{source.kind}** `{source.name}`: {source.note}.")
        lines += [f"  - `{path}` sha256 `{digest}`" for path, digest in source.files]
    return _card("Motion transfer model", "\n".join(lines))


def _card(title: str, text: str) -> str:
    return (
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-video\ntags:\n- motion-transfer\n---\n\n"
        f"# {title}\n\n{text}\n\n"
        "```python\nfrom emt.pipeline import MotionTransferPipeline\n\n"
        'pipe = MotionTransferPipeline.from_pretrained("this folder or its hub id")\n```\n'
    )
