"""LoRAs, a VAE and textual inversions over an open pipeline, changed from clip to clip, exactly."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from emt.backbones.sd15.lora import LoraMerge
from emt.backbones.sd15.stable_diffusion import VAE_SCALE, read_vae, text_state
from emt.backbones.sd15.textual_inversion import add_embeddings, read_embedding
from emt.checkpoints import check_keys
from emt.errors import EmtError

if TYPE_CHECKING:
    from emt.pipeline import MotionTransfer

_Key = tuple[str, str]  # a network of the pipeline, and the name of a weight in it


class WeightSwitch:
    """Lays LoRAs, a VAE and textual inversions over a pipeline, and takes them off again.

    Weights are written in place, so that captured calls and engines that read them where they are take them without
    being built again. Each change begins at the pipeline's own weights, which are kept in the computer's memory for
    those that were ever changed: after other files, the same ones give the same bits.

    Args:
        pipe: the pipeline, with its weights as they were opened; on any device, in any dtype but float8.
    """

    def __init__(self, pipe: MotionTransfer) -> None:
        self.pipe = pipe
        self._own: dict[_Key, Tensor] = {}  # the pipeline's own weights
        self._laid: set[_Key] = set()  # weights that are others now
        self._words = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()

    @torch.no_grad()
    def set(
        self,
        loras: Sequence[tuple[str | Path, float]] = (),
        vae: str | Path | None = None,
        embeddings: Mapping[str, str | Path] | None = None,
    ) -> None:
        """Have the pipeline's own weights with these files over them, and with no others.

        The sum of several LoRAs is rounded in their order.

        Args:
            loras: files and scales.
            vae: file or folder; None for the pipeline's own.
            embeddings: file of each word.

        Raises:
            EmtError: for a file that does not fit, or with which a weight is beyond the pipeline's dtype; then the
                pipeline is as it was.
        """
        width = self._words[1].weight.shape[1]
        vectors = {word: read_embedding(path, width) for word, path in (embeddings or {}).items()}
        weights = self._merged(loras) if loras else {}
        weights |= self._replaced(vae) if vae is not None else {}
        self._set_words(vectors)
        parameters = self._parameters()
        for key in self._laid - weights.keys():
            parameters[key].copy_(self._own[key])
        for key, value in weights.items():
            parameters[key].copy_(value)
        self._laid = set(weights)

    def keep_words(self) -> None:
        """Count the words that the pipeline has now as its own, such as those of `load_textual_inversion`."""
        self._words = self.pipe.tokenizer, self.pipe.text_encoder.get_input_embeddings()

    def _parameters(self) -> dict[_Key, nn.Parameter]:
        parts = {name: dict(getattr(self.pipe, name).named_parameters()) for name in ("unet", "vae")}
        parts["text_encoder"] = text_state(dict(self.pipe.text_encoder.named_parameters()))  # type: ignore[assignment]
        return {(part, name): parameter for part, own in parts.items() for name, parameter in own.items()}

    def _keep(self, key: _Key, parameter: nn.Parameter) -> Tensor:
        """The pipeline's own weight, in the computer's memory from here on."""
        if key not in self._own:
            self._own[key] = parameter.detach().to("cpu", copy=True)
        return self._own[key]

    def _merged(self, loras: Sequence[tuple[str | Path, float]]) -> dict[_Key, Tensor]:
        """The weights that LoRAs change, summed as an import sums them."""
        parameters = self._parameters()
        states: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}, "vae": {}}
        for (part, name), parameter in parameters.items():
            states[part][name] = self._own.get((part, name), parameter.data)
        merge = LoraMerge(states["unet"], states["text_encoder"])
        for path, scale in loras:
            merge.read(path, scale)
        for part, layer in merge.layers:
            for name in (f"{own}{layer}.{kind}" for own in ("", "denoising.") for kind in ("weight", "bias")):
                if (part, name) in parameters:
                    merge.states[part][name] = self._keep((part, name), parameters[part, name])
        changed = merge.apply(self.pipe.unet.dtype)
        bad = [name for part, name in changed if not torch.isfinite(merge.states[part][name]).all()]
        if bad:
            files = ", ".join(str(path) for path, _ in loras)
            raise EmtError(
                f"with {files} {len(bad)} weights are not finite in {self.pipe.unet.dtype}: {bad[0]}, …",
                "Give a lower scale, or --precision fp32.",
            )
        return {(part, name): merge.states[part][name] for part, name in changed}

    def _replaced(self, vae: str | Path) -> dict[_Key, Tensor]:
        """The weights of another VAE."""
        own, (part, _) = self.pipe.vae, read_vae(vae)
        parameters = {name: p for (network, name), p in self._parameters().items() if network == "vae"}
        check_keys(f"VAE {part.where}", part.state, {name: p.shape for name, p in parameters.items()})
        scales = [float(config.get("scaling_factor", VAE_SCALE)) for config in (part.config, own.config)]
        if scales[0] != scales[1]:
            raise EmtError(
                f"the VAE {part.where} scales latents by {scales[0]:g}, the model's by {scales[1]:g}",
                "Give a VAE of Stable Diffusion 1.5, such as vae-ft-mse-840000-ema-pruned.safetensors.",
            )
        weights = {name: tensor.to(own.dtype) for name, tensor in part.state.items()}
        bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise EmtError(
                f"{len(bad)} weights of the VAE {part.where} are not finite in {own.dtype}: {bad[0]}, …",
                "Download it again, or use --precision fp32.",
            )
        for name, parameter in parameters.items():
            self._keep(("vae", name), parameter)
        return {("vae", name): tensor for name, tensor in weights.items()}

    def _set_words(self, vectors: Mapping[str, Tensor]) -> None:
        """Have the words of the pipeline's own tokenizer, and these."""
        tokenizer, table = self._words
        taken = [word for word in vectors if word in tokenizer.get_vocab()]
        if taken:
            raise EmtError(
                f"--embedding {taken[0]}=…: the model has a word {taken[0]!r}", "Give the embedding another name."
            )
        if vectors:
            tokenizer, table = copy.deepcopy(tokenizer), copy.deepcopy(table)
        self.pipe.tokenizer = tokenizer
        self.pipe.text_encoder.set_input_embeddings(table)
        add_embeddings(self.pipe, vectors)


def merge_loras(pipe: MotionTransfer, loras: Sequence[tuple[str | Path, float]]) -> None:
    """Add LoRA files, each times its scale, to the weights of a pipeline, in place and for good.

    Raises:
        EmtError: for a file that does not fit, or with which a weight is beyond the pipeline's dtype.
    """
    WeightSwitch(pipe).set(loras)
