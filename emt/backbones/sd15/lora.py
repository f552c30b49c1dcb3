"""LoRA files of every naming, merged into the weights that they were trained on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emt.checkpoints import Origin, State, locate, published_motion_name, read_checkpoint, read_config
from emt.errors import EmtError

if TYPE_CHECKING:
    from emt.pipeline import MotionTransferPipeline

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
class LoraMerge:
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

    def read(self, lora: str | Path, scale: float) -> Origin:
        """Add the layers of a file, times `scale`.

        Raises:
            EmtError: naming every key that is not half of a layer, belongs to no weight or does not fit it.
        """
        path = locate(lora, "LoRA")
        checkpoint = read_checkpoint(path, "a LoRA")
        files = [path]
        metadata = json.loads(checkpoint.metadata.get("lora_adapter_metadata", "{}"))
        peft_config = path.parent / "adapter_config.json"
        if path.name.startswith("adapter_model.") and peft_config.is_file():
            metadata, _ = read_config(peft_config)
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
        return Origin("LoRA", str(lora), files, note)

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
        module = published_motion_name(module.replace(".processor.", ".").removeprefix("unet."))
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


@torch.no_grad()
def merge_loras(pipe: MotionTransferPipeline, loras: Sequence[tuple[Path, float]]) -> None:
    """Add LoRA files, each times its scale, to the weights of a pipeline that is on the CPU, in place.

    Raises:
        EmtError: for a file that does not fit, naming every key that does not.
    """
    own = {"unet": dict(pipe.unet.named_parameters())}
    own["text_encoder"] = {n.removeprefix("text_model."): p for n, p in pipe.text_encoder.named_parameters()}
    merge = LoraMerge(*({name: p.data for name, p in part.items()} for part in own.values()))
    for path, scale in loras:
        merge.read(path, scale)
    merge.apply(pipe.unet.dtype)
    for part, name in merge.layers:
        own[part][name].copy_(merge.states[part][name])


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
