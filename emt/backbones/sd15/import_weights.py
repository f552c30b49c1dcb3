"""From the published files to one model folder.

Every file is read without copying it into memory where its format allows, brought to the published names, checked
key by key, and copied once into the network in the type that is stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from emt.backbones.sd15.lora import LoraMerge
from emt.backbones.sd15.stable_diffusion import (
    GROUPS,
    HEADS,
    Part,
    StableDiffusion,
    animatediff_scheduler,
    apply_dreambooth,
    read_base,
    text_state,
)
from emt.backbones.sd15.unet import MotionTransferUNet, without_positions
from emt.checkpoints import (
    M,
    Origin,
    Source,
    State,
    allocate,
    check_keys,
    locate,
    naming_file,
    published_motion_name,
    read_checkpoint,
    read_config,
    weights_file,
)
from emt.errors import EmtError, first_line
from emt.model_folder import model_card, new_folder
from emt.pipeline import MotionTransferPipeline

DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ImportReport:
    """What `import_weights` wrote, and from what."""

    folder: Path
    sources: tuple[Source, ...]


# --------------------------------------------------------------------------------------------------------------- import


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
    with new_folder(output, overwrite, inputs) as partial:
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
) -> tuple[MotionTransferPipeline, list[Origin]]:
    """Read every source and put the model together; mapped files and merged copies are let go on return."""
    step("Reading the base")
    model = read_base(base)
    origins = [Origin("base", str(base), model.files, "UNet, VAE, text encoder")]
    if dreambooth is not None:
        step("Reading the DreamBooth model")
        origins.append(apply_dreambooth(model, dreambooth))
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
        origins.append(Origin("adapter", "none", [], "starts from the motion module's projections, not trained"))
    stored = DTYPES[dtype]
    unet = _build(lambda: MotionTransferUNet(**config), stored, model.unet.where)
    _check_unet(unet, model.unet, motion, trained, adapter)
    text_config = CLIPTextConfig.from_dict(model.text_encoder.config)
    _check_together(model, text_config)
    words, words_origin = _read_tokenizer(tokenizer, model, text_config)

    merge = LoraMerge(unet=model.unet.state | motion.state, text_encoder=model.text_encoder.state)
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
    scheduler = animatediff_scheduler(model.prediction_type)
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


def _read_tokenizer(
    given: str | Path | None, model: StableDiffusion, config: CLIPTextConfig
) -> tuple[PreTrainedTokenizerBase, Origin]:
    name: str | Path = given if given is not None else DEFAULT_TOKENIZER
    if given is None and model.folder is not None:
        name = model.folder / "tokenizer"
    hint = (
        "Give --tokenizer FOLDER: the tokenizer folder of any Stable Diffusion 1.5 in diffusers layout, or download it "
        f"where there is a network: hf download {DEFAULT_TOKENIZER} tokenizer.json tokenizer_config.json vocab.json "
        "merges.txt --local-dir FOLDER"
    )
    files = ["tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json"]
    folder = locate(name, "tokenizer", snapshot_download, hint, allow_patterns=files)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EmtError(f"the tokenizer {name} cannot be loaded: {first_line(error)}", hint) from error
    if len(tokenizer) > config.vocab_size:
        raise EmtError(
            f"the tokenizer {name} has {len(tokenizer)} tokens, the text encoder knows {config.vocab_size}", hint
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    read = [path for path in sorted(folder.iterdir()) if any(path.match(pattern) for pattern in files)]
    return tokenizer, Origin("tokenizer", str(name), read, f"{len(tokenizer)} tokens")


# -------------------------------------------------------------------------------------------- motion module and adapter


def _read_motion_module(motion_module: str | Path) -> tuple[Part, Origin]:
    path = locate(
        motion_module, "motion module", snapshot_download, allow_patterns=["config.json", "diffusion_pytorch_model.*"]
    )
    files = []
    folder = path if path.is_dir() else path.parent
    settings: dict[str, Any] = {}
    if path.is_dir() or _is_motion_adapter(folder / "config.json"):
        settings, config_file = read_config(folder / "config.json")
        files.append(config_file)
    weights = weights_file(path) if path.is_dir() else path
    files.append(weights)
    checkpoint = read_checkpoint(weights, "a motion module")
    state = {published_motion_name(name): tensor for name, tensor in checkpoint.state.items()}
    positions = [tensor.shape[-2] for name, tensor in state.items() if name.endswith(".pe")]
    config = {
        "motion_mid_block": any(name.startswith("mid_block.") for name in state),
        "motion_max_frames": min(positions, default=settings.get("motion_max_seq_length", 32)),
        "motion_attention_heads": settings.get("motion_num_attention_heads", HEADS),
    }
    if settings.get("motion_norm_num_groups", GROUPS) != GROUPS:
        raise EmtError(
            f"{folder / 'config.json'} has motion_norm_num_groups {settings['motion_norm_num_groups']}, "
            f"supported is {GROUPS}",
            "Give a motion module of AnimateDiff v1, v2 or v3.",
        )
    part = Part(config, naming_file(weights, without_positions, state), str(weights))
    mid = "with" if config["motion_mid_block"] else "without"
    note = f"{len(part.state)} tensors, {mid} mid block, up to {config['motion_max_frames']} frames"
    return part, Origin("motion module", str(motion_module), files, note)


def _is_motion_adapter(config: Path) -> bool:
    return config.is_file() and read_config(config)[0].get("_class_name") == "MotionAdapter"


def _read_adapter(adapter: str | Path) -> tuple[State, list[int], Origin]:
    """The trained weights by published names, and the up blocks that they are of."""
    path = locate(adapter, "adapter")
    if path.is_dir():
        raise EmtError(f"the adapter {path} is a folder", "Give the adapter's .ckpt or .safetensors file.")
    state = naming_file(path, without_positions, read_checkpoint(path, "an adapter").state)
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
    return state, blocks, Origin("adapter", str(adapter), [path], note)


def _check_unet(
    unet: MotionTransferUNet, base: Part, motion: Part, adapter: State | None, adapter_path: str | Path | None
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


def _check_together(model: StableDiffusion, text_config: CLIPTextConfig) -> None:
    text, unet = model.text_encoder, model.unet
    if text_config.hidden_size != unet.config["cross_attention_dim"]:
        raise EmtError(
            f"the text encoder of {text.where} has width {text_config.hidden_size}, "
            f"the UNet of {unet.where} reads {unet.config['cross_attention_dim']}",
            "Give a text encoder and a UNet of the same model.",
        )
    if model.vae.config.get("latent_channels", 4) != 4:
        raise EmtError(
            f"the VAE of {model.vae.where} has {model.vae.config['latent_channels']} latent channels, the UNet has 4",
            "Give the VAE of a Stable Diffusion 1.5.",
        )


# --------------------------------------------------------------------------------------------------------------- models


def _build(build: Callable[[], M], dtype: torch.dtype, where: str) -> M:
    try:
        return allocate(build, dtype)
    except (ValueError, TypeError) as error:
        raise EmtError(
            f"{where} describes no model that can be built: {error}", "Give Stable Diffusion 1.5."
        ) from error


@torch.no_grad()
def _fill(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy weights into a model of diffusers or transformers after checking every key."""
    parameters = text_state(dict(model.named_parameters()))
    check_keys(what, state, {name: p.shape for name, p in parameters.items()})
    for name, p in parameters.items():
        p.copy_(state[name])


def _reset_scalers(unet: MotionTransferUNet) -> None:
    """Initialise the scalers as PyTorch does, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, module in unet.named_modules():
            if ".scaler." in name and isinstance(module, nn.Conv2d):
                module.reset_parameters()


def _check_finite(what: str, model: nn.Module, dtype: str) -> None:
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise EmtError(
            f"{len(bad)} weights of the {what} are not finite in {dtype}: {', '.join(bad)}",
            "Store it with --dtype fp32." if dtype == "fp16" else "The source is damaged: download it again.",
        )


# --------------------------------------------------------------------------------------------------------------- output


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
    return model_card("Motion transfer model", "\n".join(lines))
