"""Motion transfer as a pipeline of diffusers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.backbone import BACKBONES, LARGE_TEXT_ENCODERS, import_backbones
from emt.checkpoints import check_loaded
from emt.diffusers_interface import DiffusersInterface
from emt.diffusers_loras import LoraInterface
from emt.pipeline import MotionTransfer
from emt.prompts import PromptEncoder

_MODULE = "pipeline"
"""The module of a model folder that diffusers imports, by the folder's `model_index.json`."""

# diffusers imports no network's module because a folder names it. Packages that it finds missing are to be named as pip
# knows them: lines that it reads as imports would name `emt`.
_CUSTOM_PIPELINE = '''"""Opens this folder in diffusers, where emt is installed.

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""

try:
    import emt.pipeline, {module}  # noqa: E401
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "emt":
        raise
    raise ModuleNotFoundError("This model needs emt: pip install emt-cli", name=error.name) from None

{name} = emt.pipeline.{name}
'''


class MotionTransferPipeline(
    DiffusersInterface, LoraInterface, TextualInversionLoaderMixin, DiffusionPipeline, MotionTransfer
):
    """`MotionTransfer` as a pipeline of diffusers, which opens, saves, moves and extends it.

    The numbers are the model's defaults; those of this signature are the published ones.

    Args:
        vae: autoencoder of images, such as Stable Diffusion's, or Wan's of video (`emt.backends.codec`).
        text_encoder: CLIP's. None where prompts are encoded apart (`prompt_encoder`).
        tokenizer: of the text encoder.
        unet: the adapted network, an `emt.backbone.Backbone`.
        scheduler: its configuration is what the named schedulers are made from.
        frames: of a clip.
        height: pixels.
        width: pixels.
        steps: of the sampler.
        guidance: classifier-free guidance scale.
        reference_timestep: noise level at which the reference is read, of 1000.
        sampler: a name of `SCHEDULERS`.
        adapter: "none" if it is not trained.
        guided_by_reference: guidance leads away from the clip with neither prompt nor reference, instead of from that
            without the prompt; for the transformer of Wan 2.1.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar = ["text_encoder"]
    # diffusers' own finds no words that the tokenizer writes in small letters.
    maybe_convert_prompt = MotionTransfer.maybe_convert_prompt

    def __init__(
        self,
        vae: ModelMixin,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        frames: int = 16,
        height: int = 512,
        width: int = 512,
        steps: int = 25,
        guidance: float = 6.0,
        reference_timestep: int = 400,
        sampler: str = "ddim",
        adapter: str = "trained",
        guided_by_reference: bool = False,
    ) -> None:
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            reference_timestep=reference_timestep,
            # Only what is not usual, so that other versions open the folder, too.
            **({} if sampler == "ddim" else {"sampler": sampler}),
            **({} if adapter == "trained" else {"adapter": adapter}),
            **({"guided_by_reference": True} if guided_by_reference else {}),
        )
        self._assemble()
        #: The scheduler that the model came with: one that was put in its place samples itself (`__call__`).
        self.models_scheduler = scheduler

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a configuration; the module that one names for diffusers is left out.

        So that no code of a folder runs, nor has to be trusted, where this class opens it.
        """
        config = super()._dict_from_json_file(json_file)
        named = config.get("_class_name")
        return config | {"_class_name": named[-1]} if isinstance(named, list) and named else config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> MotionTransferPipeline:
        """Open a model folder or hub id, with the options of `DiffusionPipeline.from_pretrained`.

        Raises:
            EmtError: a part has not the weights that its file holds.
            OSError: there is no such model, or a file of it is missing.
        """
        where = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
        given = {name: options[name] for name in where if name in options}
        index = cls.load_config(str(pretrained_model_name_or_path), **given)
        import_backbones(index)
        if index.get("vae", ["", ""])[1] == "AutoencoderKLWan" and isinstance(options.get("dtype"), torch.dtype):
            options["dtype"] = {"default": options["dtype"], "vae": torch.float32}  # as it was trained
        apart = index.get("text_encoder", ["", ""])[1] in LARGE_TEXT_ENCODERS and "text_encoder" not in options
        if apart:
            options["text_encoder"] = None
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            cached = {name: options[name] for name in ("cache_dir", "revision", "variant") if name in options}
            folder = Path(cls.download(str(pretrained_model_name_or_path), local_files_only=True, **cached))
        parts = {name: part for name, part in pipe.components.items() if name not in options}
        networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        check_loaded(networks, folder, options.get("variant"))
        if apart:
            pipe.prompt_encoder = PromptEncoder.of_model(pretrained_model_name_or_path, **given)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a model folder, as `DiffusionPipeline.save_pretrained`, with the text encoder that is not open.

        With `pipeline.py`, `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` opens it, too; not a
        model whose prompts are encoded apart.
        """
        if self.text_encoder is not None:  # diffusers' `unload_textual_inversion` leaves the number as it was
            self.text_encoder.config.vocab_size = self.text_encoder.get_input_embeddings().num_embeddings
        super().save_pretrained(str(save_directory), **options)
        index, written = Path(save_directory) / "model_index.json", {}
        kind, name = type(self.unet).__name__, MotionTransferPipeline.__name__
        if self.prompt_encoder is None and kind in BACKBONES:
            text = _CUSTOM_PIPELINE.format(module=BACKBONES[kind][0], name=name)
            (Path(save_directory) / f"{_MODULE}.py").write_text(text, encoding="utf-8")
            written = {"_class_name": [_MODULE, name]}
        if self.prompt_encoder is not None:
            source = self.prompt_encoder.model
            shutil.copytree(source / "text_encoder", Path(save_directory) / "text_encoder")
            written = {"text_encoder": json.loads((source / "model_index.json").read_bytes())["text_encoder"]}
        index.write_text(json.dumps(json.loads(index.read_bytes()) | written, indent=2) + "\n")

    def save_memory(self, device: torch.device | str) -> None:
        """Make clips on a GPU with little memory, more slowly; the pipeline is in the computer's memory so far.

        Of text encoder, network and VAE only the one that is needed is on the GPU. Samples go through the network
        one by one, frames through the VAE, and a reference is prepared layer by layer, anew at each step, from features
        in the computer's memory.
        """
        self.enable_model_cpu_offload(device=device)
