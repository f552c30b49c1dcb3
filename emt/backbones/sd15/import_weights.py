"""From the published files to one model folder.

Every file is read without copying it into memory where its format allows, brought to the published names, checked
key by key, and copied once into the network in the type that is stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from emt.backbones.sd15.adapter_checkpoint import AdapterCheckpoint, read_adapter
from emt.backbones.sd15.checkpoint_kinds import SDXL, unet_guess
from emt.backbones.sd15.few_steps import find_few_steps
from emt.backbones.sd15.lora import LoraMerge
from emt.backbones.sd15.motion_checkpoint import read_motion_module
from emt.backbones.sd15.stable_diffusion import (
    PREDICTION_TYPES,
    Component,
    StableDiffusion,
    animatediff_scheduler,
    apply_dreambooth,
    read_base,
    read_vae,
    text_state,
    tokenizer_files,
)
from emt.backbones.sd15.unet import MotionTransferUNet
from emt.checkpoints import M, Origin, allocate, check_keys, check_varied, shorten, without_zeros
from emt.errors import EmtError, first_line
from emt.hub import OnFetch, locate
from emt.importing import ImportReport, Progress, Steps, import_card
from emt.model_folder import UNTRAINED, new_folder
from emt.pipeline import MotionTransferPipeline
from emt.text_encoding import embeddings_of

DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"
_MODEL = "Stable Diffusion 1.5 with motion modules and the motion transfer adapter"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}

# --------------------------------------------------------------------------------------------------------------- import


def import_weights(
    output: str | Path,
    *,
    base: str | Path,
    motion_module: str | Path,
    dreambooth: str | Path | None = None,
    vae: str | Path | None = None,
    adapter: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    dtype: str = "fp16",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ImportReport:
    """Make one model folder, which `MotionTransferPipeline.from_pretrained` opens, from the published files.

    AnimateLCM, AnimateDiff-Lightning and latent-consistency LoRAs, recognized by name, set their sampler, steps and
    guidance as the model's defaults.

    Each source is a path, `hf://owner/name/file`, or `hf://owner/name` where a repository is the folder or holds one
    file of weights; what is fetched stays in the hub's cache. The folder appears under its name only once it is
    complete; an import that is killed leaves `.NAME.partial` beside it, which the next one replaces.

    Args:
        output: the folder to write.
        base: Stable Diffusion 1.5: a diffusers folder, a hub id, or one file in the original layout, whose plain (not
            `model_ema`) weights are used.
        motion_module: AnimateDiff's .ckpt, a diffusers `MotionAdapter` (folder, file or hub id), or a file or folder of
            a network that has one.
        dreambooth: one file in the original layout; its UNet replaces the base's, and so do its VAE and text encoder
            if it has them.
        vae: a VAE's file or folder; replaces the others'.
        adapter: EfficientMT's checkpoint, of a whole network or a part of it: all of its weights denoise, none reads
            the reference. None starts the adapter from the motion module's projections.
        loras: files and scales, merged into the UNet, motion module and text encoder; not into the adapter's temporal
            projections and scalers.
        tokenizer: folder or hub id; None takes the base folder's, or `DEFAULT_TOKENIZER` if the base is one file.
        prediction_type: of the UNet, "epsilon" or "v_prediction"; None takes what the file that gives the UNet says,
            "epsilon" if it says nothing.
        dtype: of the stored weights, "fp16" or "fp32".
        overwrite: replace the output folder, if it is a model folder.
        on_progress: called with what is being done, steps done and steps in all.

    Raises:
        EmtError: for a source that is missing, damaged, unsafe or of another kind, naming it and the keys that do
            not fit; for an output folder that exists; and if the folder cannot be written.
    """
    output = Path(output)
    if dtype not in DTYPES:
        raise EmtError(f"there is no type {dtype!r} to store weights in", f"Allowed: {', '.join(DTYPES)}.")
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise EmtError(f"there is no prediction type {prediction_type!r}", f"Allowed: {', '.join(PREDICTION_TYPES)}.")
    step = Steps(on_progress, 6 + len(loras) + sum(x is not None for x in (dreambooth, vae, adapter)))
    inputs = [base, motion_module, dreambooth, vae, adapter, tokenizer, *(path for path, _ in loras)]
    with new_folder(output, overwrite, inputs) as partial:
        pipe, origins = _assemble(
            base, motion_module, dreambooth, vae, adapter, loras, tokenizer, prediction_type, dtype, step
        )
        step("Hashing the sources")
        sources = tuple(origin.hashed() for origin in origins)
        step("Writing the model folder")
        pipe.save_pretrained(partial)
        (partial / "README.md").write_text(import_card(_MODEL, sources, dtype), encoding="utf-8")
        step("Flushing to disk")
    step.end()
    return ImportReport(output, sources)


def _assemble(
    base: str | Path,
    motion_module: str | Path,
    dreambooth: str | Path | None,
    vae_path: str | Path | None,
    adapter: str | Path | None,
    loras: Sequence[tuple[str | Path, float]],
    tokenizer: str | Path | None,
    prediction_type: str | None,
    dtype: str,
    step: Steps,
) -> tuple[MotionTransferPipeline, list[Origin]]:
    """Read every source and put the model together; mapped files and merged copies are let go on return."""
    step("Reading the base")
    model = read_base(base, step.fetching)
    origins = [Origin("base", str(base), model.files, "UNet, VAE, text encoder", model.dropped)]
    if dreambooth is not None:
        step("Reading the DreamBooth model")
        origins.append(apply_dreambooth(model, dreambooth, step.fetching))
    if prediction_type is not None:
        model.prediction_type, model.prediction_sign = prediction_type, "as the user said"
    if model.prediction_sign:
        origins[-1].note += f"; predicts {model.prediction_type} ({model.prediction_sign})"
    if vae_path is not None:
        step("Reading the VAE")
        model.vae, origin = read_vae(vae_path, step.fetching)
        origins.append(origin)
    step("Reading the motion module")
    motion, origin = read_motion_module(motion_module, step.fetching)
    origins.append(origin)
    config = model.unet.config | motion.config
    trained: AdapterCheckpoint | None = None
    if adapter is not None:
        step("Reading the adapter")
        trained = read_adapter(adapter, step.fetching)
        origins.append(trained.origin)
        if trained.blocks != list(range(len(config["block_out_channels"]))):
            config["fusion_blocks"] = trained.blocks
    else:
        origins.append(Origin("adapter", "none", [], "starts from the motion module's projections, not trained"))
    stored = DTYPES[dtype]
    unet = _build(lambda: MotionTransferUNet(**config), stored, model.unet.where)
    _check_unet(unet, model.unet, motion, trained)
    text_config = _text_config(model.text_encoder)
    _check_together(model, text_config)
    words, words_origin = _read_tokenizer(tokenizer, model, text_config, step.fetching)

    more = unet.denoising_states(trained.state) if trained else {}
    merge = LoraMerge(unet=model.unet.state | motion.state | more, text_encoder=model.text_encoder.state)
    for path, scale in loras:
        step(f"Reading LoRA {Path(path).name}")
        origins.append(merge.read(path, scale, step.fetching))

    step("Assembling the model")
    merge.apply(stored)
    if trained is None:
        _reset_scalers(unet)
        unet.load_published(merge.states["unet"])
    else:
        names = {name.removeprefix("denoising."): name for name in more}
        merged = {own: merge.states["unet"].pop(name) for own, name in names.items()}
        unet.load_published(merge.states["unet"], trained.state | merged)
        trained.note_use(unet)
    vae = _build(lambda: AutoencoderKL.from_config(model.vae.config), stored, model.vae.where)
    _fill(vae, model.vae.state, f"VAE of {model.vae.where}")
    text_encoder = _build(lambda: CLIPTextModel(text_config), stored, model.text_encoder.where)
    _fill(text_encoder, merge.states["text_encoder"], f"text encoder of {model.text_encoder.where}")
    for name, part in (("UNet", unet), ("VAE", vae), ("text encoder", text_encoder)):
        _check_values(name, part, dtype)
    sources = [o for kind in ("motion module", "LoRA", "DreamBooth model") for o in origins if o.kind == kind]
    few = find_few_steps(name for source in sources for name in (source.name, *(path.name for path in source.files)))
    defaults: dict[str, Any] = {}
    if few is not None:
        defaults = {"sampler": few.sampler, "steps": few.steps, "guidance": few.guidance}
        note = f"{few.sampler}, {few.steps} steps, guidance {few.guidance:g}; options of a clip change them"
        origins.append(Origin("sampling", few.title, [], note))
    if trained is None:
        defaults["adapter"] = UNTRAINED
    scheduler = animatediff_scheduler(model.prediction_type, few.spacing if few else None)
    pipe = MotionTransferPipeline(vae, text_encoder, words, unet, scheduler, **defaults)
    return pipe, [*origins, words_origin]


def _read_tokenizer(
    given: str | Path | None, model: StableDiffusion, config: CLIPTextConfig, on_fetch: OnFetch
) -> tuple[PreTrainedTokenizerBase, Origin]:
    name: str | Path = given if given is not None else DEFAULT_TOKENIZER
    if given is None and model.folder is not None:
        name = model.folder / "tokenizer"
    hint = (
        "Give --tokenizer FOLDER: the tokenizer folder of any Stable Diffusion 1.5 in diffusers layout, or download it "
        f"where there is a network: hf download {DEFAULT_TOKENIZER} tokenizer.json tokenizer_config.json vocab.json "
        "merges.txt --local-dir FOLDER"
    )
    folder = locate(name, "tokenizer", tokenizer_files, hint=hint, on_fetch=on_fetch)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    try:
        # Never with code of the folder's own, for which transformers prompts on the terminal otherwise.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError("it makes no tokenizer")
        if type(tokenizer.model_max_length) is not int or tokenizer.model_max_length < 3:
            raise ValueError(f"its model_max_length is {tokenizer.model_max_length!r:.60}")
        if len(tokenizer("").input_ids) != 2:
            raise ValueError("it puts no token before a prompt and one after it, as CLIP's does")
    except Exception as error:  # damaged files fail in any way in the parsers of tokenizers
        reason = "it has code of its own, which is not run" if "trust_remote_code" in str(error) else first_line(error)
        raise EmtError(f"the tokenizer {name} cannot be loaded: {reason}", hint) from error
    words = embeddings_of(tokenizer)
    if words > config.vocab_size:
        raise EmtError(f"the tokenizer {name} has {words} tokens, the text encoder knows {config.vocab_size}", hint)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    read = [folder / name for name in tokenizer_files(sorted(path.name for path in folder.iterdir()))]
    return tokenizer, Origin("tokenizer", str(name), read, f"{len(tokenizer)} tokens")


# ------------------------------------------------------------------------------------------------------------ the parts


def _check_unet(
    unet: MotionTransferUNet, base: Component, motion: Component, adapter: AdapterCheckpoint | None
) -> None:
    """Compare the keys of each source with its share of the network, so that an error names the file."""
    shapes = unet.published_shapes()
    spatial = {name: shape for name, shape in shapes.backbone.items() if ".motion_modules." not in name}
    check_keys(f"UNet of {base.where}", base.state, spatial, unet_guess(base.state))
    temporal = {name: shape for name, shape in shapes.backbone.items() if ".motion_modules." in name}
    check_keys(f"motion module {motion.where}", motion.state, temporal, _motion_guess(motion, unet))
    if adapter is not None:
        check_keys(f"adapter {adapter.origin.name}", adapter.state, shapes.of_adapter(adapter.state))


def _motion_guess(motion: Component, unet: MotionTransferUNet) -> str:
    """Description of a motion module that may not fit: those of SDXL have three levels."""
    levels = {match[1] for name in motion.state if (match := re.match(r"down_blocks\.(\d+)\.", name))}
    return f"it looks like one of {SDXL}" if len(levels) == 3 < len(unet.config.block_out_channels) else ""


def _text_config(part: Component) -> CLIPTextConfig:
    try:
        return CLIPTextConfig.from_dict(part.config)
    except Exception as error:  # values of another kind fail in any way in transformers' checks
        raise EmtError(
            f"the configuration of {part.where} is damaged: {first_line(error)}", "Download it again."
        ) from error


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
    except Exception as error:  # values of another kind fail in any way in the networks of diffusers
        raise EmtError(
            f"{where} describes no model that can be built: {first_line(error)}", "Give Stable Diffusion 1.5."
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


def _check_values(what: str, model: nn.Module, dtype: str) -> None:
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise EmtError(
            f"{len(bad)} weights of the {what} are not finite in {dtype}{shorten([bad])}",
            "Store it with --dtype fp32." if dtype == "fp16" else "The source is damaged: download it again.",
        )
    weights = without_zeros(model, dict(model.named_parameters()))
    check_varied(what, weights, "The source is damaged: download it again.")
