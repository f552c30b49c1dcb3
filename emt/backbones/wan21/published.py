"""Reading of the published files of Wan 2.1: transformer, text encoder, VAE and tokenizer, in every layout."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from emt.backbones.wan21.names import SUPPORTED, check_is_text_to_video, renamed, transformer_name, umt5_name, vae_names
from emt.checkpoints import (
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
from emt.hub import Choose, OnFetch, locate, matching

N = TypeVar("N", bound=nn.Module)

# Settings of diffusers' VAE that Wan 2.1's has, and that its weights do not show.
_VAE_BUILT_IN: dict[str, tuple[Any, ...]] = {
    "is_residual": (False,),
    "patch_size": (None, 1),
    "scale_factor_spatial": (None, 8),
    "scale_factor_temporal": (None, 4),
}

#: Channels of a head in every published Wan, for files without a configuration.
HEAD_CHANNELS = 128

_HUB_FILES = [
    "*.json",
    "transformer/*",
    "vae/*",
    "text_encoder/*",
    "tokenizer/*",
    "scheduler/*",
    "diffusion_pytorch_model*.safetensors",
    "models_t5_umt5-xxl-enc-*.pth",
    "Wan2.1_VAE.pth",
    "google/*",
]
_TOKENIZER_FILES = ["tokenizer*.json", "spiece.model", "special_tokens_map.json"]
#: Where parts are in a folder of all of Wan.
_PLACES = {
    "diffusers": {"text encoder": "text_encoder", "VAE": "vae", "tokenizer": "tokenizer"},
    "original": {
        "text encoder": "models_t5_umt5-xxl-enc-*.pth",
        "VAE": "Wan2.1_VAE.pth",
        "tokenizer": "google/umt5-xxl",
    },
}
#: Pipelines of diffusers whose transformers are of other kinds.
_OTHER_PIPELINES = {
    "WanImageToVideoPipeline": "Wan image to video",
    "WanVACEPipeline": "Wan 2.1 VACE",
    "WanAnimatePipeline": "Wan 2.2 Animate",
    "WanSpeechToVideoPipeline": "Wan 2.2 S2V, which is driven by sound",
}
#: The same by `model_type` of an original configuration.
_OTHER_KINDS = {
    "i2v": "Wan image to video",
    "flf2v": "Wan image to video",
    "vace": "Wan 2.1 VACE",
    "ti2v": "Wan 2.2 TI2V-5B",
    "s2v": "Wan 2.2 S2V, which is driven by sound",
    "animate": "Wan 2.2 Animate",
}


@dataclass
class Component:
    """The weights of a network by diffusers' or transformers' names, its configuration, and the files read."""

    state: State
    config: dict[str, Any]
    where: str
    files: list[Path] = field(default_factory=list)
    scales: State = field(default_factory=dict)  # by which weights in float8 count

    def value(self, name: str, weight: Tensor) -> Tensor:
        """A weight as it counts: itself, or times its scale."""
        return weight.float() * self.scales[name] if name in self.scales else weight


@dataclass
class Base:
    """Kind of base: a folder in diffusers' layout, one of the original files, or the transformer alone."""

    path: Path
    layout: str  # "diffusers", "original" or "transformer"
    on_fetch: OnFetch | None = None

    def part(self, name: str, given: str | Path | None) -> Path:
        """Location of a part: as given, or in the base.

        Raises:
            EmtError: if the base has no such part and none was given.
        """
        option = f"--{name.replace(' ', '-').lower()}"
        if given is not None:
            path = locate(given, name, _files_of(name), on_fetch=self.on_fetch)
            inside = [found for places in _PLACES.values() for found in sorted(path.glob(places[name]))]
            return inside[0] if path.is_dir() and inside else path
        pattern = _PLACES.get(self.layout, {}).get(name)
        found = sorted(self.path.glob(pattern)) if pattern else []
        if not found:
            problem = f"{self.path} has no {name}" + (f": no {pattern}" if pattern else "; it is the transformer alone")
            raise EmtError(problem, f"Give {option} FILE_OR_FOLDER, or a folder of all of Wan 2.1 as --base.")
        return found[0]


def _files_of(part: str) -> Choose:
    """Files to fetch of a repository that a part is in: of all of Wan, or of other networks, its own alone."""

    def choose(names: Sequence[str]) -> list[str]:
        of_all = [place for places in _PLACES.values() for place in (places[part], f"{places[part]}/*")]
        if inside := matching(*of_all)(names):
            return inside
        if part == "tokenizer":
            return matching(*_TOKENIZER_FILES, "config.json")(names)
        weights = weights_names(name for name in names if "/" not in name)
        return [*weights, *matching("config.json")(names)] if weights else []

    return choose


def _text_to_video(base: str | Path, *patterns: str) -> Choose:
    """Files to fetch of a repository of patterns, but nothing of one that shows by its names that it is Wan 2.2.

    Raises:
        EmtError: when it chooses, if it is.
    """

    def choose(names: Sequence[str]) -> list[str]:
        if any(name.split("/")[0] in ("high_noise_model", "transformer_2") for name in names):
            raise EmtError(f"{base} is Wan 2.2, which has two transformers", SUPPORTED)
        return matching(*patterns)(names)

    return choose


def _check_kind(base: str | Path, folder: Path) -> None:
    """Raise an EmtError for a folder whose configurations say that it is of another kind, or of Wan 2.2."""
    if not folder.is_dir():
        if re.search(r"(high|low)[-_ ]?noise", f"{folder.parent.name}/{folder.name}", re.IGNORECASE):
            raise EmtError(f"{base} is one of the two transformers of Wan 2.2", SUPPORTED)
        return
    index, settings = _settings(folder / "model_index.json"), _settings(folder / "config.json")
    second = index.get("transformer_2")
    two = (second and second != [None, None]) or index.get("boundary_ratio") is not None
    if two or (folder / "high_noise_model").is_dir():
        raise EmtError(f"{base} is Wan 2.2, which has two transformers", SUPPORTED)
    kind = _OTHER_PIPELINES.get(str(index.get("_class_name"))) or _OTHER_KINDS.get(str(settings.get("model_type")))
    if kind:
        raise EmtError(f"{base} is {kind}, which is not supported", SUPPORTED)


def read_base(base: str | Path, on_fetch: OnFetch | None = None) -> tuple[Base, Component]:
    """Find out what the base is, and read its transformer.

    Raises:
        EmtError: if there is no such base, or it is of another network of the family, which it names.
    """
    hint = "Give Wan-AI/Wan2.1-T2V-1.3B-Diffusers, a folder that `hf download` made of it, or a file."
    # What a repository is, its configurations say: of another kind nothing is fetched for hours.
    small = _text_to_video(base, "model_index.json", "config.json")
    _check_kind(base, locate(base, "base", small, hint=hint, on_fetch=on_fetch))
    path = locate(base, "base", _text_to_video(base, *_HUB_FILES), hint=hint, on_fetch=on_fetch)
    if (path / "model_index.json").is_file():
        index, _ = read_config(path / "model_index.json")
        if not (path / "transformer").is_dir():
            raise EmtError(f"{base} has no transformer: it is a {index.get('_class_name')}", hint)
        found, folder = Base(path, "diffusers", on_fetch), path / "transformer"
    elif path.is_dir():
        whole = any(path.glob("models_t5_umt5-xxl-enc-*.pth")) or (path / "Wan2.1_VAE.pth").is_file()
        found, folder = Base(path, "original" if whole else "transformer", on_fetch), path
    else:
        found, folder = Base(path, "transformer", on_fetch), path
    checkpoint, files = read_weights(folder, scaled=True)
    state, scales = (renamed(x, _bare_transformer_name, str(folder)) for x in (checkpoint.state, checkpoint.scales))
    check_is_text_to_video(state, str(folder))
    settings = _settings((folder if folder.is_dir() else folder.parent) / "config.json")
    return found, Component(state, transformer_config(state, settings, str(folder)), str(folder), files, scales)


def _bare_transformer_name(name: str) -> str:
    for prefix in ("model.diffusion_model.", "diffusion_model.", "model."):
        name = name.removeprefix(prefix)
    return transformer_name(name)


def _settings(path: Path) -> dict[str, Any]:
    return read_config(path)[0] if path.is_file() else {}


def transformer_config(state: State, settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of the transformer, from the shapes of its weights.

    Args:
        state: by diffusers' names.
        settings: configuration beside the weights, diffusers' or original, which knows the heads; empty for none.
        where: the weights are, for errors.

    Raises:
        EmtError: if a weight that the shapes are inferred from is missing, or heads are not known.
    """
    with sizes_of_weights(f"{where} is no transformer of Wan", "Download it again: weights are missing."):
        channels, in_channels, *patch = state["patch_embedding.weight"].shape
        config: dict[str, Any] = {
            "patch_size": tuple(patch),
            "in_channels": in_channels,
            "out_channels": state["proj_out.weight"].shape[0] // math.prod(patch),
            "text_dim": state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "ffn_dim": state["blocks.0.ffn.net.0.proj.weight"].shape[0],
        }
        config["num_layers"] = 1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name)))
    check_sizes(config, where)
    heads = settings.get("num_attention_heads", settings.get("num_heads", channels // HEAD_CHANNELS))
    if type(heads) is not int or heads < 1 or channels % heads:
        raise EmtError(
            f"{where} has {channels} channels, which {heads!r:.40} heads do not divide",
            "Give the config.json beside it.",
        )
    config |= {"num_attention_heads": heads, "attention_head_dim": channels // heads}
    eps = settings.get("eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise EmtError(f"the config.json of {where} has eps {eps!r:.40}", "Download it again; Wan has 1e-06.")
    return config | {"eps": eps}


def read_text_encoder(base: Base, given: str | Path | None) -> Component:
    """UMT5 by transformers' names; its configuration is inferred from the shapes.

    Raises:
        EmtError: if it is no UMT5.
    """
    path = base.part("text encoder", given)
    checkpoint, files = read_weights(path, scaled=True)
    state, scales = (renamed(x, umt5_name, str(path)) for x in (checkpoint.state, checkpoint.scales))
    state.pop("spiece_model", None)  # the tokenizer's, which some single files carry
    first = "encoder.block.0.layer"
    with sizes_of_weights(f"{path} is not the text encoder UMT5", "Give Wan's UMT5."):
        bias = state[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
        vocabulary, width = state["shared.weight"].shape
        config: dict[str, Any] = {
            "vocab_size": vocabulary,
            "d_model": width,
            "d_kv": state[f"{first}.0.SelfAttention.q.weight"].shape[0] // bias.shape[1],
            "d_ff": state[f"{first}.1.DenseReluDense.wi_0.weight"].shape[0],
            "num_layers": 1 + max(int(m[1]) for n in state if (m := re.match(r"encoder\.block\.(\d+)\.", n))),
            "num_heads": bias.shape[1],
            "relative_attention_num_buckets": bias.shape[0],
            "feed_forward_proj": "gated-gelu",
        }
    check_sizes(config, str(path))
    model = without_values(lambda: UMT5EncoderModel(UMT5Config(**config)), str(path))
    shapes = {name: p.shape for name, p in model.state_dict().items() if "embed_tokens" not in name}
    check_keys(f"text encoder {path}", state, shapes)
    return Component(state, config, str(path), files, scales)


def read_vae(base: Base, given: str | Path | None, channels: int) -> Component:
    """Wan 2.1's VAE by diffusers' names; `channels` are the latent channels that the transformer takes.

    Raises:
        EmtError: if it is another one.
    """
    path = base.part("VAE", given)
    checkpoint, files = read_weights(path)
    names = vae_names(checkpoint.state)
    state = renamed(checkpoint.state, names.__getitem__, str(path))
    known = inspect.signature(AutoencoderKLWan).parameters
    config = {name: value for name, value in _settings(path / "config.json").items() if name in known}
    if "encoder.conv_in.weight" not in state or "post_quant_conv.weight" not in state:
        raise EmtError(f"{path} is not the VAE of Wan: it has no encoder.conv_in.weight", "Give Wan2.1_VAE.pth.")
    resnets = {int(m[1]) for name in state if (m := re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", name))}
    with sizes_of_weights(f"{path} is not the VAE of Wan", "Give Wan2.1_VAE.pth."):
        config |= {
            "base_dim": state["encoder.conv_in.weight"].shape[0],
            "z_dim": state["post_quant_conv.weight"].shape[0],
            "num_res_blocks": max(len(resnets) - 1, 1),
        }
    check_sizes(config, str(path))
    if config["z_dim"] != channels:
        raise EmtError(
            f"the VAE {path} has {config['z_dim']} latent channels, the transformer takes {channels}",
            "Give the VAE of Wan 2.1, which has 16; that of Wan 2.2 TI2V-5B has 48.",
        )
    _check_latents(config, str(path))
    model = without_values(lambda: AutoencoderKLWan(**config), str(path))
    check_keys(f"VAE {path}", state, {name: p.shape for name, p in model.state_dict().items()})
    return Component(state, config, str(path), files)


def _check_latents(config: Mapping[str, Any], where: str) -> None:
    """Raise an EmtError if latents of a VAE are others than Wan 2.1 works on."""
    wrong = [name for name, allowed in _VAE_BUILT_IN.items() if config.get(name, allowed[0]) not in allowed]
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0.0)):
        values = config.get(name, [1.0] * config["z_dim"])
        numbers = [x for x in values if type(x) in (int, float)] if isinstance(values, list) else []
        if not len(values or ()) == len(numbers) == config["z_dim"] or not all(least < x < math.inf for x in numbers):
            wrong.append(name)
    if wrong:
        listed = shorten([[f"{name} is {config[name]!r:.60}" for name in wrong]])
        raise EmtError(f"the VAE {where} is not that of Wan 2.1{listed}", "Give the VAE of Wan 2.1.")


def without_values(build: Callable[[], N], where: str) -> N:
    """A network on "meta": shapes without values.

    Raises:
        EmtError: if what `where` says of it makes none.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # values of another kind fail in any way in the networks of libraries
        raise EmtError(f"no network can be made of {where}: {first_line(error)}", SUPPORTED) from error


def read_tokenizer(base: Base, given: str | Path | None, most: int) -> tuple[PreTrainedTokenizerBase, list[Path]]:
    """The tokenizer, of at most `most` tokens, and its files.

    Raises:
        EmtError: if it cannot be opened, or has more tokens than the text encoder knows.
    """
    folder = base.part("tokenizer", given)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    hint = "Give --tokenizer FOLDER: the folder `tokenizer` of Wan 2.1 in diffusers layout, or google/umt5-xxl of it."
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of whatever kind: values of configurations reach deep into the library
        raise EmtError(f"the tokenizer {folder} cannot be loaded: {first_line(error)}", hint) from error
    if len(tokenizer) > most:
        raise EmtError(f"the tokenizer {folder} has {len(tokenizer)} tokens, the text encoder knows {most}", hint)
    return tokenizer, [p for p in sorted(folder.iterdir()) if any(p.match(pattern) for pattern in _TOKENIZER_FILES)]
