"""Reading Stable Diffusion 1.5 in its two layouts: a folder of diffusers, and one file of the original code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from emt.backbones.sd15.checkpoint_kinds import (
    SDXL,
    SINGLE_FILE,
    UNET,
    VAE,
    describe,
    one_prefix,
    read_kind,
    unet_guess,
)
from emt.checkpoints import (
    Checkpoint,
    Origin,
    State,
    check_keys,
    check_sizes,
    read_config,
    read_weights,
    shorten,
    sizes_of_weights,
    weights_names,
)
from emt.errors import EmtError, first_line
from emt.hub import OnFetch, folder_instead, locate

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

# What Stable Diffusion 1.5 is, beyond its widths: the files in the original layout carry no configuration.
PREDICTION_TYPES = ("epsilon", "v_prediction")
HEADS = 8
GROUPS = 32
VAE_SCALE = 0.18215
_XL_VAE_SCALE = 0.13025
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
_TOKENIZER_FILES = re.compile(r"(tokenizer[\w.]*\.json|vocab\.json|merges\.txt|special_tokens_map\.json)")
# The parts of a file in the original layout: how their keys begin, and the layers of the network among them. A key of
# another layer belongs to training, to a sampler or to another model that was merged in, and nothing reads it.
_LDM_PARTS = {
    "UNet": ("model.diffusion_model.", r"(time_embed|input_blocks|middle_block|output_blocks|out|label_emb)\."),
    "VAE": ("first_stage_model.", r"(encoder|decoder|quant_conv|post_quant_conv)\."),
    "text encoder": ("cond_stage_model.", r"transformer\.(text_model\.)?(embeddings|encoder|final_layer_norm)\."),
}
_DEPRECATED_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class Component:
    """One network as read: its configuration, its weights by published names, and the files' names for errors."""

    config: dict[str, Any]
    state: State
    where: str


@dataclass
class StableDiffusion:
    """A model as read.

    Args:
        unet: as read.
        vae: as read.
        text_encoder: as read.
        files: that it was read from.
        folder: in diffusers layout, if it is one.
        prediction_type: of the UNet, "epsilon" or "v_prediction".
        prediction_sign: how that is known, for the model card.
        dropped: keys in the files that nothing reads.
    """

    unet: Component
    vae: Component
    text_encoder: Component
    files: list[Path]
    folder: Path | None = None
    prediction_type: str = "epsilon"
    prediction_sign: str = ""
    dropped: list[str] = field(default_factory=list)


@dataclass
class _SingleFile:
    """The parts ("UNet", "VAE", "text encoder") that a file in the original layout has."""

    parts: dict[str, Component]
    prediction_type: str
    prediction_sign: str
    dropped: list[str]


def folder_files(names: Sequence[str]) -> list[str]:
    """The files to read of a folder in diffusers layout, among all its names; none if it has no UNet."""
    if "unet/config.json" not in names:
        return []
    chosen = [n for n in ("model_index.json", "scheduler/scheduler_config.json") if n in names]
    chosen += [n for n in names if n.startswith("tokenizer/") and _TOKENIZER_FILES.fullmatch(n[len("tokenizer/") :])]
    for part in ("unet", "vae", "text_encoder"):
        weights = weights_names(n[len(part) + 1 :] for n in names if n.startswith(f"{part}/"))
        chosen += [n for n in (f"{part}/config.json", *(f"{part}/{name}" for name in weights)) if n in names]
    return chosen


def tokenizer_files(names: Sequence[str]) -> list[str]:
    """The files to read of a tokenizer's folder, among all its names."""
    return [n for n in names if _TOKENIZER_FILES.fullmatch(n.removeprefix("tokenizer/"))]


def read_base(base: str | Path, on_fetch: OnFetch | None = None) -> StableDiffusion:
    """Read a diffusers folder, a hub id, or one file in the original layout.

    Raises:
        EmtError: if it is missing, damaged, incomplete or of another kind.
    """
    path = locate(base, "base", folder_files, on_fetch=on_fetch)
    if path.is_dir():
        return _read_diffusers_folder(path)
    file = _ldm_parts(path, read_kind(path, SINGLE_FILE))
    missing = [name for name in ("VAE", "text encoder") if name not in file.parts]
    if missing:
        raise EmtError(
            f"{path} has no {' and no '.join(missing)}",
            "Give it as --dreambooth, over a --base that is complete.",
        )
    return StableDiffusion(
        file.parts["UNet"],
        file.parts["VAE"],
        file.parts["text encoder"],
        [path],
        prediction_type=file.prediction_type,
        prediction_sign=file.prediction_sign,
        dropped=file.dropped,
    )


def _read_diffusers_folder(folder: Path) -> StableDiffusion:
    if not (folder / "unet").is_dir() and (folder / "model_index.json").is_file():
        pipeline = read_config(folder / "model_index.json")[0].get("_class_name")
        raise EmtError(f"{folder} is a {pipeline} without a UNet", "Give Stable Diffusion 1.5 or a fine-tune of it.")
    if not (folder / "unet").is_dir():
        raise folder_instead(folder, "Give a file, or a folder in diffusers layout, with unet, vae and text_encoder.")
    parts, files, dropped = {}, [], []
    for name in ("unet", "vae", "text_encoder"):
        config, config_file = read_config(folder / name / "config.json")
        check_sizes(config, str(config_file))
        checkpoint, read = read_weights(folder / name)
        parts[name] = Component(config, checkpoint.state, str(read[0] if len(read) == 1 else folder / name))
        dropped += [f"{name}: {key}" for key in checkpoint.dropped]
        files += [config_file, *read]
    where = str(folder / "unet" / "config.json")
    try:
        parts["unet"].config = _unet_config(parts["unet"].config, where)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise EmtError(f"{where} is damaged: {first_line(error)}", "Download it again.") from error
    # Weights of SD 1.5 are older than the names of the VAE's attention in diffusers.
    parts["vae"].state = {
        re.sub(r"(?<=\.attentions\.0\.)\w+", lambda m: _DEPRECATED_VAE_NAMES.get(m[0], m[0]), name): tensor
        for name, tensor in parts["vae"].state.items()
    }
    _check_vae_config(parts["vae"].config, str(folder / "vae" / "config.json"))
    text, unread = text_weights(parts["text_encoder"].state)
    parts["text_encoder"].state = text
    dropped += [f"text_encoder: {key}" for key in unread]
    model = StableDiffusion(parts["unet"], parts["vae"], parts["text_encoder"], files, folder, dropped=dropped)
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler, config_file = read_config(folder / "scheduler" / "scheduler_config.json")
        model.prediction_type = _prediction_type(scheduler.get("prediction_type", "epsilon"), str(config_file))
        model.prediction_sign = "its scheduler_config.json"
        files.append(config_file)
    return model


def _prediction_type(value: Any, where: str) -> str:
    if value not in PREDICTION_TYPES:
        raise EmtError(f"{where} has the prediction_type {value!r}", f"Supported are {', '.join(PREDICTION_TYPES)}.")
    return str(value)


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
        xl = config.get("addition_embed_type") == "text_time" or config.get("cross_attention_dim") == 2048
        raise EmtError(
            f"{where} does not describe a UNet of Stable Diffusion 1.5"
            + (f": it looks like {SDXL}" if xl else "")
            + shorten([wrong]),
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


def _ldm_parts(path: Path, checkpoint: Checkpoint) -> _SingleFile:
    """The networks of a file in the original layout.

    Raises:
        EmtError: if its layers are not those of Stable Diffusion 1.5.
    """
    groups: dict[str, State] = {name: {} for name in _LDM_PARTS}
    dropped = list(checkpoint.dropped)
    for key, tensor in _with_prefix(checkpoint.state).items():
        for name, (prefix, layers) in _LDM_PARTS.items():
            if key.startswith(prefix) and re.match(layers, key[len(prefix) :]):
                groups[name][key] = tensor
                break
        else:
            dropped += [key] if key in checkpoint.state and key != "v_pred" else []
    groups["text encoder"], twice = _text_model_once(groups["text encoder"])
    dropped += twice
    read = {"UNet": _ldm_unet, "VAE": _ldm_vae, "text encoder": _ldm_text_encoder}
    parts = {name: _read_part(name, group, read[name], path) for name, group in groups.items() if group}
    if "UNet" not in parts:
        raise EmtError(f"{path} has no UNet", "Give Stable Diffusion 1.5 or a fine-tune of it.")
    return _SingleFile(parts, *_find_prediction_type(checkpoint), dropped)


def _unet_alone(path: Path, checkpoint: Checkpoint) -> _SingleFile:
    """The UNet of a file that holds it alone by diffusers' names.

    Raises:
        EmtError: if it is of another version.
    """
    part = _read_part("UNet", checkpoint.state, lambda state: (_unet_sizes(state), state), path)
    return _SingleFile({"UNet": part}, *_find_prediction_type(checkpoint), list(checkpoint.dropped))


def _unet_sizes(state: State) -> dict[str, Any]:
    """Arguments of `MotionTransferUNet` from the weights of a UNet by diffusers' names."""
    levels = 1 + max(int(m[1]) for name in state if (m := re.match(r"down_blocks\.(\d+)\.", name)))
    widths = [state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]  # a gap ends it
    attended = [i for i in range(levels) if f"down_blocks.{i}.attentions.0.proj_in.weight" in state]
    first = r"down_blocks\.0\.resnets\.\d+\.conv1\.weight"
    return {
        "block_out_channels": widths,
        "layers_per_block": sum(bool(re.fullmatch(first, name)) for name in state),
        "cross_attention_dim": next(t.shape[1] for k, t in state.items() if k.endswith("attn2.to_k.weight")),
        "attention_heads": HEADS,
        "norm_num_groups": GROUPS,
    } | ({} if attended == list(range(levels - 1)) else {"attention_levels": attended})


def _read_part(
    name: str, group: State, convert: Callable[[State], tuple[dict[str, Any], State]], path: Path
) -> Component:
    """A part by published names; every layer of it in the file is used."""
    try:
        config, converted = convert(group)
        state = {name: tensor for name, tensor in converted.items() if tensor is not None}  # some for what is missing
    except (KeyError, IndexError, ValueError, AttributeError, StopIteration, TypeError, RuntimeError) as error:
        guess = unet_guess(group) if name == "UNet" else ""
        reason = f"it has no {error.args[0]}" if isinstance(error, KeyError) and error.args else first_line(error)
        raise EmtError(
            f"the {name} in {path} does not have the layout of Stable Diffusion 1.5: {guess or reason}",
            "Give Stable Diffusion 1.5 or a fine-tune of it; other versions do not fit the motion modules.",
        ) from error
    # The conversions pass over what they do not know. A layer that the network does not have makes another network;
    # a converted tensor is the stored one or the start of it.
    used = {tensor.data_ptr() for tensor in state.values()}
    lost = {k: t for k, t in group.items() if t.data_ptr() not in used and not k.endswith(".position_ids")}
    check_keys(f"{name} in {path}", lost, {}, unet_guess(group) if name == "UNet" else "")
    return Component(config, state, str(path))


def _with_prefix(state: State) -> State:
    """Keys of a UNet alone, which some programs save without the prefix of whole files, with it."""
    if any(key.startswith("model.diffusion_model.") for key in state):
        return state
    return {f"model.diffusion_model.{key.removeprefix('diffusion_model.')}": tensor for key, tensor in state.items()}


def _text_model_once(group: State) -> tuple[State, list[str]]:
    """One name a weight, where a merge has kept the older name, without `text_model`, beside the present one."""
    twice = [key for key in group if key.replace(".transformer.", ".transformer.text_model.") in group]
    return {key: tensor for key, tensor in group.items() if key not in twice}, twice


def _find_prediction_type(checkpoint: Checkpoint) -> tuple[str, str]:
    """The prediction type of a single file's UNet, and the sign of it: a key `v_pred`, or its metadata."""
    stated = checkpoint.metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in checkpoint.state:
        return "v_prediction", "its key v_pred"
    if stated in ("v", "v_prediction", "epsilon"):
        return "epsilon" if stated == "epsilon" else "v_prediction", "its metadata modelspec.prediction_type"
    return "epsilon", ""


# diffusers is imported where a file needs it: a LoRA of a run does without.


def _ldm_unet(state: State) -> tuple[dict[str, Any], State]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

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
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

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
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

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
        "scaling_factor": VAE_SCALE,
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


def text_weights(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """Weights of the text encoder in a file of it or of all of CLIP, and the keys of what else is there."""
    inside = re.compile(r"(text_model\.)?(embeddings|encoder|final_layer_norm)\.")
    return text_state({n: t for n, t in state.items() if inside.match(n)}), [n for n in state if not inside.match(n)]


def apply_dreambooth(model: StableDiffusion, dreambooth: str | Path, on_fetch: OnFetch | None = None) -> Origin:
    """Replace the UNet and its prediction type, and the VAE and text encoder if the file has them, by one file's.

    A file in the original layout, or a UNet alone by diffusers' names.

    Raises:
        EmtError: if the file is missing, damaged or of another kind.
    """
    path = locate(dreambooth, "DreamBooth model", on_fetch=on_fetch)
    if path.is_dir():
        raise EmtError(
            f"the DreamBooth model {path} is a folder", "Give one .safetensors or .ckpt file, or the folder as --base."
        )
    checkpoint = read_kind(path, SINGLE_FILE, UNET)
    file = (_unet_alone if describe(checkpoint.state) == UNET else _ldm_parts)(path, checkpoint)
    model.unet = file.parts["UNet"]
    model.vae = file.parts.get("VAE", model.vae)
    model.text_encoder = file.parts.get("text encoder", model.text_encoder)
    model.prediction_type, model.prediction_sign = file.prediction_type, file.prediction_sign
    kept = [name for name in ("VAE", "text encoder") if name not in file.parts]
    note = ", ".join(file.parts) + " replace the base's" + (f"; it has no {' or '.join(kept)}" if kept else "")
    return Origin("DreamBooth model", str(dreambooth), [path], note, file.dropped)


def read_vae(vae: str | Path, on_fetch: OnFetch | None = None) -> tuple[Component, Origin]:
    """Read a VAE alone: a file in the original layout or in that of diffusers, or a folder of diffusers.

    Raises:
        EmtError: if it is missing, damaged or of another kind.
    """
    path = locate(vae, "VAE", _vae_files, on_fetch=on_fetch)
    files = [path]
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        if not (path / "config.json").is_file():
            raise folder_instead(path, "Give a VAE's file, or the folder of one in diffusers layout.")
        config, config_file = read_config(path / "config.json")
        check_sizes(config, str(config_file))
        checkpoint, read = read_weights(path)
        state, files = checkpoint.state, [config_file, *read]
        dropped = list(checkpoint.dropped)
    else:
        whole = read_kind(path, VAE, SINGLE_FILE, own=_without_vae_prefix)
        # Stable Diffusion XL's VAE has the same layers, of the same shapes, and other latents.
        named = f"{path.name} {whole.metadata.get('modelspec.architecture', '')}".lower()
        if re.search(r"sdxl|sd_xl|xl[._-]?vae|stable-diffusion-xl", named):
            raise EmtError(
                f"{path} says that it is of {SDXL}, whose VAE has the same layers and other latents",
                "Give a VAE of Stable Diffusion 1.5; if it is one, another file name.",
            )
        state = whole.state
        prefix, layers = _LDM_PARTS["VAE"]
        names = {key: key if key.startswith(prefix) else f"{prefix}{key}" for key in state}
        group = {own: state[key] for key, own in names.items() if re.match(layers, own[len(prefix) :])}
        dropped = [*whole.dropped, *(key for key in state if names[key] not in group)]
        if not group:
            raise EmtError(f"{path} has no VAE", "Give a file with keys such as encoder.… or first_stage_model.…")
        if any(".down_blocks." in key for key in group):
            state = {key[len(prefix) :]: tensor for key, tensor in group.items()}
            with sizes_of_weights(f"{path} is no VAE of Stable Diffusion", "Download it again."):
                config = _diffusers_vae_config(state)
        else:
            part = _read_part("VAE", group, _ldm_vae, path)
            config, state = part.config, part.state
    state = {
        re.sub(r"(?<=\.attentions\.0\.)\w+", lambda m: _DEPRECATED_VAE_NAMES.get(m[0], m[0]), name): tensor
        for name, tensor in state.items()
    }
    _check_vae_config(config, str(files[0]))
    part = Component(config, state, str(files[-1]))
    return part, Origin("VAE", str(vae), files, f"{len(state)} tensors, replaces the others'", dropped)


def _without_vae_prefix(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """A file with the names of its VAE as they are in a file of a VAE alone; averages of it are left."""
    end = "decoder.conv_in.weight"
    prefixes = Counter(name.removesuffix(end) for name in checkpoint.state if name.endswith(end))
    if not prefixes or (prefix := one_prefix(path, VAE, prefixes)) in ("", _LDM_PARTS["VAE"][0]):
        return checkpoint
    own = {name.removeprefix(prefix): x for name, x in checkpoint.state.items() if name.startswith(prefix)}
    beside = [name for name in checkpoint.state if not name.startswith(prefix)]
    return Checkpoint(own, checkpoint.metadata, [*checkpoint.dropped, *beside])


def _check_vae_config(config: Mapping[str, Any], where: str) -> None:
    """Raise an EmtError if latents of a VAE are others than a UNet of Stable Diffusion 1.5 works on."""
    allowed: dict[str, tuple[Any, ...]] = {
        "scaling_factor": (VAE_SCALE,),
        "shift_factor": (None, 0, 0.0),
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    wrong = [
        f"{name} is {config[name]!r:.60}" for name in allowed if config.get(name, allowed[name][0]) not in allowed[name]
    ]
    if wrong:
        xl = f": it looks like one of {SDXL}" if config.get("scaling_factor") == _XL_VAE_SCALE else ""
        raise EmtError(
            f"{where} does not describe a VAE of Stable Diffusion 1.5{xl}{shorten([wrong])}",
            f"Give a VAE of Stable Diffusion 1.5, whose latents are scaled by {VAE_SCALE}.",
        )


def _vae_files(names: Sequence[str]) -> list[str]:
    """The files to read of a VAE's folder, or of a whole model's, among all its names."""
    inside = "vae/" if "vae/config.json" in names else ""
    weights = weights_names(n[len(inside) :] for n in names if n.startswith(inside))
    if f"{inside}config.json" not in names or not weights:
        return []
    return [f"{inside}config.json", *(f"{inside}{name}" for name in weights)]


def _diffusers_vae_config(state: State) -> dict[str, Any]:
    """Configuration of a VAE in diffusers layout by its weights."""
    levels = 1 + max(int(m[1]) for name in state if (m := re.match(r"encoder\.down_blocks\.(\d+)\.", name)))
    first = r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight"
    return vae_config(
        block_out_channels=[
            state[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)
        ],
        layers_per_block=sum(bool(re.fullmatch(first, name)) for name in state),
        latent_channels=state["post_quant_conv.weight"].shape[0],
    )


def animatediff_scheduler(prediction_type: str, spacing: str | None = None) -> DDIMScheduler:
    """AnimateDiff's sampler: linear betas, where Stable Diffusion's are linear in the square root.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        spacing: of the timesteps, as diffusers calls it; None for its default.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        steps_offset=1,
        clip_sample=False,
        prediction_type=prediction_type,
        **({} if spacing is None else {"timestep_spacing": spacing}),
    )
