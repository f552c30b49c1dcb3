"""From the published files of Wan 2.1 to one model folder.

A transformer of 14 billion weights and a text encoder of 5.7 are never in memory whole: their files are mapped, checked
key by key, and converted into one new file after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config

from emt.backbones.wan21.adapter_file import initial_adapter, read_adapter
from emt.backbones.wan21.facts import trained_reference_blocks
from emt.backbones.wan21.lora import LoraMerge
from emt.backbones.wan21.published import (
    read_base,
    read_text_encoder,
    read_tokenizer,
    read_vae,
    without_values,
)
from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.checkpoints import Origin, check_keys, check_varied, shorten
from emt.errors import EmtError
from emt.importing import ImportReport, Progress, Steps, import_card
from emt.model_folder import UNTRAINED, new_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: What a clip is made with where nothing else is given: Wan 2.1 T2V-1.3B's.
DEFAULTS: dict[str, Any] = {
    "frames": 81,
    "height": 480,
    "width": 832,
    "steps": 50,
    "guidance": 5.0,
    "reference_timestep": 100,
}
#: How far noise levels are shifted towards noise: as in the published folders for 480p; 5 is for 720p.
FLOW_SHIFT = 3.0
_PARTS = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "unet": ["emt.backbones.wan21.transformer", "WanMotionTransferTransformer"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_SHARD_BYTES = 4_000_000_000
_SIZES = {(1536, 30): "T2V-1.3B", (5120, 40): "T2V-14B"}


def import_weights(
    output: str | Path,
    *,
    base: str | Path,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    reference_blocks: Sequence[int] | None = None,
    reference_neighbours: int | None = 1,
    dtype: str = "bf16",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ImportReport:
    """Make one model folder from the published files of Wan 2.1 text to video.

    The folder appears under its name only once it is complete.

    Args:
        output: the folder to write.
        base: a diffusers folder, a folder of the original files, a hub id of either, or the transformer's weights
            alone in one file or a folder of shards.
        text_encoder: UMT5 as one file or a folder of shards, original or transformers' names; None takes the base's.
        vae: the VAE as one file or a folder, original or diffusers' names; None takes the base's.
        tokenizer: folder or hub id; None takes the base's.
        adapter: what `emt train` learnt, a file or model folder. None starts it untrained.
        loras: files and scales, merged into the transformer.
        reference_blocks: of an untrained adapter, as `WanMotionTransferTransformer` has them; None for
            `trained_reference_blocks`.
        reference_neighbours: likewise, None for all: frames further away add nothing (docs/wan.md).
        dtype: of the stored weights, "bf16", "fp16" or "fp32". The VAE, and what diffusers keeps so, stay in float32.
        overwrite: replace the output folder, if it is a model folder.
        on_progress: called with what is being done, steps done and steps in all.

    Raises:
        EmtError: for a file that is missing, damaged, unsafe or of another kind, naming keys that do not fit; for an
            output folder that exists; and if the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise EmtError(f"there is no dtype {dtype!r} to store weights in", f"Allowed: {', '.join(DTYPES)}.")
    stored, step = DTYPES[dtype], Steps(on_progress, 6 + len(loras))
    inputs = [base, text_encoder, vae, tokenizer, adapter, *(path for path, _ in loras)]
    with new_folder(Path(output), overwrite, inputs) as partial:
        step("Reading the base")
        found, transformer = read_base(base, step.fetching)
        trained = None if adapter is None else read_adapter(adapter)
        options: dict[str, Any] = {"reference_blocks": reference_blocks, "reference_neighbours": reference_neighbours}
        if trained is not None:
            options = trained.options
        elif reference_blocks is None:
            options["reference_blocks"] = list(trained_reference_blocks(transformer.config["num_layers"]))
        elif not 0 <= max(reference_blocks) < transformer.config["num_layers"]:
            raise EmtError(
                f"reference_blocks has {max(reference_blocks)}",
                f"The transformer {transformer.where} has blocks 0 to {transformer.config['num_layers'] - 1}.",
            )
        config = transformer.config | options
        model = without_values(lambda: WanMotionTransferTransformer(**config), transformer.where)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        learnt = {name for name, _ in model.adapter_parameters()}
        backbone = {name: shape for name, shape in shapes.items() if name not in learnt}
        check_keys(f"transformer {transformer.where}", transformer.state, backbone)
        adapter_state = initial_adapter(model) if trained is None else trained.state
        check_keys(f"adapter {adapter}", adapter_state, {name: shapes[name] for name in learnt})

        text = read_text_encoder(found, text_encoder)
        latents = read_vae(found, vae, model.config.in_channels)
        words, words_files = read_tokenizer(found, tokenizer, text.config["vocab_size"])
        if text.config["d_model"] != model.config.text_dim:
            raise EmtError(
                f"the text encoder {text.where} has width {text.config['d_model']}, the transformer "
                f"{transformer.where} reads {model.config.text_dim}",
                "Give a text encoder and a transformer of the same model.",
            )
        size = _SIZES.get((backbone["proj_out.weight"][1], model.config.num_layers), "of no published size")
        origins = [
            Origin("base", str(base), transformer.files, f"transformer, {size}"),
            Origin("text encoder", str(text_encoder or base), text.files, f"UMT5, {text.config['num_layers']} layers"),
            Origin("VAE", str(vae or base), latents.files, f"{latents.config['z_dim']} latent channels"),
            Origin("tokenizer", str(tokenizer or base), words_files, f"{len(words)} tokens"),
            Origin("adapter", "none", [], "not trained") if trained is None else trained.origin,
        ]
        check_varied(f"transformer {transformer.where}", transformer.state)
        check_varied(f"text encoder {text.where}", text.state)
        check_varied(f"VAE {latents.where}", latents.state)
        merge = LoraMerge({name: tensor.shape for name, tensor in transformer.state.items()})
        for path, scale in loras:
            step(f"Reading LoRA {Path(path).name}")
            origins.append(merge.read(path, scale, step.fetching))

        step("Writing the transformer")
        model.save_config(partial / "unet")
        kept = tuple(model._keep_in_fp32_modules)
        write_weights(
            partial / "unet" / "diffusion_pytorch_model",
            transformer.state | adapter_state,
            lambda name: torch.float32 if any(part in name for part in kept) else stored,
            lambda name, weight: merge(name, transformer.value(name, weight)),
        )
        step("Writing the text encoder")
        settings = UMT5Config(**text.config)
        settings.architectures, settings.dtype = ["UMT5EncoderModel"], stored
        settings.save_pretrained(partial / "text_encoder")
        write_weights(partial / "text_encoder" / "model", text.state, lambda _: stored, text.value)
        step("Writing the VAE")
        with torch.device("meta"):
            AutoencoderKLWan(**latents.config).save_config(partial / "vae")
        write_weights(partial / "vae" / "diffusion_pytorch_model", latents.state, lambda _: torch.float32)
        words.save_pretrained(partial / "tokenizer")
        flow_scheduler().save_pretrained(partial / "scheduler")
        tokenizer_class = json.loads((partial / "tokenizer" / "tokenizer_config.json").read_text())["tokenizer_class"]
        index = {"_class_name": "MotionTransferPipeline", "tokenizer": ["transformers", tokenizer_class]}
        index |= _PARTS | DEFAULTS | {"guided_by_reference": True} | ({"adapter": UNTRAINED} if trained is None else {})
        (partial / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        step("Hashing the sources")
        sources = tuple(origin.hashed() for origin in origins)
        (partial / "README.md").write_text(
            import_card("Wan 2.1 with the motion transfer adapter", sources, dtype), encoding="utf-8"
        )
        step("Flushing to disk")
    step.end()
    return ImportReport(Path(output), sources)


def flow_scheduler(shift: float = FLOW_SHIFT) -> UniPCMultistepScheduler:
    """Sampler of Wan's flow: UniPC over shifted noise levels (Esser et al. 2024, arXiv 2403.03206, section 5.3.2)."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def write_weights(
    stem: Path,
    state: Mapping[str, Tensor],
    dtype_of: Callable[[str], torch.dtype],
    change: Callable[[str, Tensor], Tensor] = lambda _, weight: weight,
) -> None:
    """Write weights in files that diffusers and transformers open, one of at most 4 GB in memory at a time.

    Args:
        stem: the files' path as far as their names are the same.
        state: weights by name.
        dtype_of: dtype to store a weight in, by its name.
        change: made of a weight before that, from its name and it.

    Raises:
        EmtError: naming weights that are not finite in their dtype.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    planned = {name: torch.empty(t.shape, dtype=dtype_of(name), device="meta") for name, t in state.items()}
    shards = split_torch_state_dict_into_shards(
        planned, filename_pattern=f"{stem.name}{{suffix}}.safetensors", max_shard_size=_SHARD_BYTES
    )
    for file, names in shards.filename_to_tensors.items():
        tensors = {name: change(name, state[name]).to(dtype_of(name)).contiguous() for name in names}
        if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise EmtError(
                f"{len(bad)} weights are not finite in {dtype_of(bad[0])}{shorten([bad])}",
                "Store them with --dtype bf16 or fp32; if that does not help, the source is damaged.",
            )
        save_file(tensors, stem.with_name(file), {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
