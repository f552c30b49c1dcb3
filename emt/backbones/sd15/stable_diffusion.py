"""Reading Stable Diffusion 1.5 in its two layouts: a folder of diffusers, and one file of the original code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from emt.checkpoints import Origin, State, check_keys, locate, read_checkpoint, read_config, weights_file
from emt.errors import EmtError

# What Stable Diffusion 1.5 is, beyond its widths: the files in the original layout carry no configuration.
HEADS = 8
GROUPS = 32
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
_UNET_SIZES = ("block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types", "up_block_types")
# Training state that files in the original layout carry along; nothing of it is a weight of the model.
_LDM_EXTRAS = re.compile(
    r"model_ema\.|(betas|alphas_cumprod|alphas_cumprod_prev|logvar|lvlb_weights|scale_factor)$"
    r"|(sqrt_|log_one_minus_|posterior_)\w+$"
)
_DEPRECATED_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class Part:
    """One network as read: its configuration, its weights by published names, and the files' names for errors."""

    config: dict[str, Any]
    state: State
    where: str


@dataclass
class StableDiffusion:
    """A model as read; `folder` is where it lies in diffusers layout, if it does."""

    unet: Part
    vae: Part
    text_encoder: Part
    files: list[Path]
    folder: Path | None = None
    prediction_type: str = "epsilon"


def read_base(base: str | Path) -> StableDiffusion:
    """Read a diffusers folder, a hub id or one file in the original layout.

    Raises:
        EmtError: if it is missing, damaged, incomplete or of another kind.
    """
    path = locate(base, "base", DiffusionPipeline.download, safety_checker=None, feature_extractor=None)
    if path.is_dir():
        return _read_diffusers_folder(path)
    parts = _read_ldm_file(path)
    missing = [name for name in ("VAE", "text encoder") if name not in parts]
    if missing:
        raise EmtError(
            f"{path} has no {' and no '.join(missing)}",
            "Give it as --dreambooth, over a --base that is complete.",
        )
    return StableDiffusion(parts["UNet"], parts["VAE"], parts["text encoder"], [path])


def _read_diffusers_folder(folder: Path) -> StableDiffusion:
    parts, files = {}, []
    for name in ("unet", "vae", "text_encoder"):
        config, config_file = read_config(folder / name / "config.json")
        weights = weights_file(folder / name)
        parts[name] = Part(config, read_checkpoint(weights).state, str(weights))
        files += [config_file, weights]
    parts["unet"].config = _unet_config(parts["unet"].config, str(folder / "unet" / "config.json"))
    # Weights of SD 1.5 are older than the names of the VAE's attention in diffusers.
    parts["vae"].state = {
        re.sub(r"(?<=\.attentions\.0\.)\w+", lambda m: _DEPRECATED_VAE_NAMES.get(m[0], m[0]), name): tensor
        for name, tensor in parts["vae"].state.items()
    }
    parts["text_encoder"].state = text_state(parts["text_encoder"].state)
    model = StableDiffusion(parts["unet"], parts["vae"], parts["text_encoder"], files, folder)
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler, config_file = read_config(folder / "scheduler" / "scheduler_config.json")
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
    wrong += [f"{name} is missing" for name in _UNET_SIZES if name not in config]
    down, up = config.get("down_block_types", []), config.get("up_block_types", [])
    attended = [i for i, kind in enumerate(down) if kind == "CrossAttnDownBlock2D"]
    mirrored = [kind == "CrossAttnUpBlock2D" for kind in reversed(up)]
    if [i in attended for i in range(len(down))] != mirrored or {*down} - {"CrossAttnDownBlock2D", "DownBlock2D"}:
        wrong.append(f"the blocks are {[*down, *up]!r}")
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", HEADS)
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
        "norm_num_groups": config.get("norm_num_groups", GROUPS),
    } | ({} if attended == list(range(len(widths) - 1)) else {"attention_levels": attended})


def _read_ldm_file(path: Path) -> dict[str, Part]:
    """The parts of a single file in the original layout ("UNet", "VAE", "text encoder"): those that it has."""
    state = read_checkpoint(path, "Stable Diffusion 1.5 in the original layout").state
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
        parts[name] = Part(config, part, str(path))
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
        "attention_heads": HEADS,
        "norm_num_groups": GROUPS,
    } | ({} if attended == list(range(levels - 1)) else {"attention_levels": attended})
    return config, convert_ldm_unet_checkpoint(state, {"layers_per_block": layers})


def _ldm_vae(state: State) -> tuple[dict[str, Any], State]:
    prefix = "first_stage_model."
    levels = sum(bool(re.fullmatch(r".*\.encoder\.down\.\d+\.block\.0\.conv1\.weight", key)) for key in state)
    widths = [state[f"{prefix}encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    config = vae_config(
        block_out_channels=widths,
        layers_per_block=sum(bool(re.fullmatch(r".*\.encoder\.down\.0\.block\.\d+\.conv1\.weight", k)) for k in state),
        latent_channels=state[f"{prefix}post_quant_conv.weight"].shape[0],
    )
    return config, convert_ldm_vae_checkpoint(state, config)


def _ldm_text_encoder(state: State) -> tuple[dict[str, Any], State]:
    converted = text_state(convert_ldm_clip_checkpoint(state))
    vocabulary, width = converted["embeddings.token_embedding.weight"].shape
    config = clip_config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_attention_heads=max(width // 64, 1),
        num_hidden_layers=sum(key.endswith(".mlp.fc1.weight") for key in converted),
        intermediate_size=converted["encoder.layers.0.mlp.fc1.weight"].shape[0],
        max_position_embeddings=converted["embeddings.position_embedding.weight"].shape[0],
    )
    return config, converted


def vae_config(*, block_out_channels: Sequence[int], **sizes: Any) -> dict[str, Any]:
    """Configuration of an `AutoencoderKL` of Stable Diffusion's kind."""
    levels = len(block_out_channels)
    return {
        "block_out_channels": list(block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": GROUPS,
        "sample_size": 512,
        "scaling_factor": _VAE_SCALE,
    } | sizes


def clip_config(**sizes: Any) -> dict[str, Any]:
    """Configuration of a `CLIPTextModel` of Stable Diffusion's kind."""
    # The token ids are those of SD 1.5's own configuration; only the pooled output, not used here, reads them.
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 77} | tokens | sizes


def text_state(state: Mapping[str, Tensor]) -> State:
    """Weights of a text encoder without the prefix that versions of transformers differ in, and without indices."""
    return {
        name.removeprefix("text_model."): tensor for name, tensor in state.items() if not name.endswith(".position_ids")
    }


def apply_dreambooth(model: StableDiffusion, dreambooth: str | Path) -> Origin:
    """Replace the UNet, and the VAE and text encoder if the file has them, by those of one file.

    Raises:
        EmtError: if the file is missing, damaged or of another kind.
    """
    path = locate(dreambooth, "DreamBooth model")
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
    return Origin(
        "DreamBooth model", str(dreambooth), [path], note + (f"; it has no {' or '.join(kept)}" if kept else "")
    )


def animatediff_scheduler(prediction_type: str) -> DDIMScheduler:
    """AnimateDiff's sampler: linear betas, where Stable Diffusion's are linear in the square root."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        steps_offset=1,
        clip_sample=False,
        prediction_type=prediction_type,
    )
