"""LoRA files of Wan in every public dialect, added to the weights that they were trained on.

Modules are named by diffusers or PEFT (``transformer.blocks.0.attn1.to_q.lora_A.weight``), originally
(``diffusion_model.blocks.0.self_attn.q.lora_A.weight``, DiffSynth without the prefix, with ``.default``) or by kohya
(``lora_unet_blocks_0_self_attn_q.lora_down.weight``, Wan Fun with two underscores). lightx2v's have whole differences
beside low-rank ones: ``.diff`` of a weight, ``.diff_b`` of a bias, ``.diff_m`` of a modulation. ``lora_B.bias``, of
PEFT's lora_bias, is added to the bias and scaled as the change of the weight is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emt.backbones.wan21.names import original_module, transformer_module
from emt.checkpoints import Origin, differ, read_checkpoint, shorten
from emt.errors import EmtError
from emt.hub import OnFetch, locate
from emt.lora_files import peft_scale, peft_settings, share_alphas, tensor_problem, untrained

_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<half>down|up|A|B)(?:\.(?P<adapter>\w+))?\.weight"
    r"|lora_B(?:\.(?P<named>\w+))?\.(?P<bias>bias)|(?P<alpha>alpha)|(?P<whole>diff|diff_b|diff_m))"
)
_OTHERS = {
    re.compile(r"(^|[._])((down|up)_blocks|mid_block|(input|output)_blocks)[._]"): "Stable Diffusion",
    re.compile(r"(^|[._])(double|single)_(transformer_)?blocks[._]"): "Flux or HunyuanVideo",
}
# Of names with underscores for dots: kohya's, LyCORIS' and OneTrainer's.
_FLAT = re.compile(r"(lora_unet|lora_transformer|lycoris)__?")
_PREFIXES = (
    "base_model.model.",
    "module.",
    "pipe.",
    "dit.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.",
)


@dataclass
class _Layer:
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    alpha: float | None = None


@dataclass
class _Addition:
    """Addition to the weight `name`: factor · up · down, or factor · up if there is no other half."""

    name: str
    up: Tensor
    down: Tensor | None
    factor: float

    @property
    def is_zero(self) -> bool:
        """True if it changes nothing."""
        halves = [self.up] if self.down is None else [self.up, self.down]
        return not self.factor or not all(bool(half.any()) for half in halves)


class LoraMerge:
    """Additions of LoRA files by the weight that they change.

    Args:
        shapes: of the transformer's weights, by diffusers' names.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes
        self._additions: dict[str, list[_Addition]] = {}
        modules = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
        # kohya writes underscores for dots, which cannot be undone without the names.
        self._flat = {name.replace(".", "_"): name for name in modules}
        self._flat |= {original_module(name).replace(".", "_"): name for name in modules}

    def read(self, lora: str | Path, scale: float, on_fetch: OnFetch | None = None) -> Origin:
        """Take the additions of a file, times `scale`.

        Raises:
            EmtError: if it changes nothing, or naming keys that are of no weight here, lack their other half or do not
                fit.
        """
        path = locate(lora, "LoRA", on_fetch=on_fetch)
        checkpoint = read_checkpoint(path)
        metadata, files = peft_settings(checkpoint, path)

        layers: dict[tuple[str, str], _Layer] = {}
        names: dict[tuple[str, str], str] = {}
        found: list[_Addition | str] = []
        for key, tensor in checkpoint.state.items():
            match = _KEY.fullmatch(key)
            if match is None:
                found.append(f"unexpected: {key} {tuple(tensor.shape)}")
                continue
            adapter = match["adapter"] or match["named"] or ""
            kind = match["whole"] or adapter or "low rank"
            module = names.setdefault((self._module(match["module"]), kind), match["module"])
            if module != match["module"]:
                found.append(f"one weight by two names: {module}, {match['module']}")
            elif problem := tensor_problem(key, tensor, is_number=bool(match["alpha"])):
                found.append(problem)
            elif match["whole"]:
                found.append(self._whole(match["module"], match["whole"], tensor, scale))
            else:
                layer = layers.setdefault((match["module"], adapter), _Layer())
                down = match["half"] in ("down", "A")
                if match["half"] and (layer.down if down else layer.up) is not None:
                    found.append(f"a half of one layer by two names, one of them {key}")
                elif match["alpha"]:
                    layer.alpha = float(tensor)
                elif match["bias"]:
                    layer.bias = tensor
                elif down:
                    layer.down = tensor
                else:
                    layer.up = tensor
        share_alphas(layers)
        # An alpha alone, of a layer that was pruned, changes nothing.
        layers = {name: it for name, it in layers.items() if any(t is not None for t in (it.down, it.up, it.bias))}
        for (module, _), layer in layers.items():
            found += self._low_rank(module, layer, metadata, scale)
        problems = [problem for problem in found if isinstance(problem, str)]
        if problems:
            raise EmtError(
                f"the LoRA {path} does not fit this model{self._guess(checkpoint.state)}, {differ(len(problems))}"
                f"{shorten([problems])}",
                "Give a LoRA of Wan 2.1 text to video of the same size; LoHa, LoKr and DoRA are not read.",
            )
        additions = [addition for addition in found if isinstance(addition, _Addition)]
        if scale and all(addition.is_zero for addition in additions):
            raise untrained(path, len(additions))
        for addition in additions:
            self._additions.setdefault(addition.name, []).append(addition)
        whole = len(additions) - len(layers) - sum(layer.bias is not None for layer in layers.values())
        note = f"scale {scale:g}; {len(layers)} layers of low rank" + (f", {whole} whole differences" if whole else "")
        return Origin("LoRA", str(lora), files, note, checkpoint.dropped)

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """A weight with all that was added to it, summed in float32; itself if that is nothing."""
        for addition in self._additions.get(name, []):
            change = addition.up.float()
            if addition.down is not None:
                change = change.flatten(1) @ addition.down.float().flatten(1)
            weight = weight.float() + addition.factor * change.view(weight.shape)
        return weight

    def _low_rank(self, module: str, layer: _Layer, metadata: Mapping[str, Any], scale: float) -> list[_Addition | str]:
        """Change by a pair of low-rank factors and a bias, or the reason why there is none."""
        name = f"{self._module(module)}.weight"
        if name not in self._shapes:
            return [f"no such weight in the model: {module}"]
        down, up = layer.down, layer.up
        if down is None or up is None:
            return [f"missing: the {'down' if down is None else 'up'} half of {module}"]
        rows, columns = self._shapes[name][0], math.prod(self._shapes[name][1:])
        if (
            min(up.ndim, down.ndim) < 2
            or up.flatten(1).shape != (rows, len(down))
            or down.flatten(1).shape[1] != columns
        ):
            return [f"wrong shape: {module} is {tuple(up.shape)} × {tuple(down.shape)}, the weight ({rows}, {columns})"]
        if not len(down):
            return [f"rank 0: {module}"]
        own = {key.removeprefix("transformer."): value for key, value in metadata.items()}
        try:
            factor = peft_scale(own, module, len(down)) if layer.alpha is None else layer.alpha / len(down)
        except ValueError as error:
            return [f"{error}: {module}"]
        change = _Addition(name, up, down, scale * factor)
        if layer.bias is None:
            return [change]
        shape = self._shapes.get(f"{self._module(module)}.bias")
        if layer.bias.shape != shape:
            return [
                f"wrong shape: the bias of {module} is {tuple(layer.bias.shape)}, the model's {shape and tuple(shape)}"
            ]
        return [change, _Addition(f"{self._module(module)}.bias", layer.bias, None, scale * factor)]

    def _whole(self, module: str, kind: str, difference: Tensor, scale: float) -> _Addition | str:
        """Change by a full difference, or the reason why there is none."""
        if kind == "diff_m":
            name = transformer_module(f"{_bare(module)}.modulation")
        elif kind == "diff_b":
            name = f"{self._module(module)}.bias"
        else:
            name = self._module(module)
            name = name if name in self._shapes else f"{name}.weight"
        if name not in self._shapes:
            return f"no such weight in the model: {module}.{kind}"
        if difference.numel() != math.prod(self._shapes[name]):
            return f"wrong shape: {module}.{kind} is {tuple(difference.shape)}, the weight {tuple(self._shapes[name])}"
        return _Addition(name, difference, None, scale)

    def _module(self, module: str) -> str:
        """A module as a LoRA names it, by diffusers' name."""
        if flat := _FLAT.match(module):
            return self._flat.get(module[flat.end() :], module)
        return transformer_module(_bare(module))

    def _guess(self, state: Mapping[str, Tensor]) -> str:
        """Network that the file belongs to, where names or shapes show it."""
        if any("_img" in name or "img_emb" in name or "add_k_proj" in name for name in state):
            return ": it is of image to video"
        for pattern, network in _OTHERS.items():
            if any(pattern.search(name) for name in state):
                return f": it looks like one of {network}"
        own = self._shapes["patch_embedding.weight"][0]
        found = re.compile(r".*blocks[._]0[._](?:self_attn|attn1)[._](?:to_)?q\.lora_(?:down|A)\b.*")
        widths = {tensor.shape[-1] for name, tensor in state.items() if tensor.ndim and found.fullmatch(name)} - {own}
        return f": it is of a width of {widths.pop()}, the model's is {own}" if widths else ""


def _bare(module: str) -> str:
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return module
