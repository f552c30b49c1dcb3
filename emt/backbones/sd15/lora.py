"""LoRA files of every naming, merged into the weights that they were trained on."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emt.backbones.sd15.checkpoint_kinds import LORA, describe, other_version, wrong_kind
from emt.backbones.sd15.lora_layers import LoraLayer
from emt.backbones.sd15.motion_checkpoint import published_motion_name
from emt.checkpoints import Checkpoint, Origin, State, differ, read_checkpoint, shorten
from emt.errors import EmtError
from emt.hub import OnFetch, folder_instead, locate
from emt.lora_files import peft_scale, peft_settings, share_alphas, tensor_problem, untrained

logger = logging.getLogger(__name__)

# A key's module and the role of its tensor: kohya, PEFT, diffusers, the attention processors of diffusers and
# AnimateDiff, LyCORIS. PEFT puts an adapter's name, such as `default`, before or after.
_KEYS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<module>.+?)\.lora_(?P<role>down|up|mid|A|B)(\.(?P<adapter>[\w-]+))?\.weight",
        r"(?P<module>.+?)\.lora_B(\.(?P<adapter>[\w-]+))?\.(?P<role>bias)",
        r"(?P<module>.+?)(\.lora(_linear_layer)?|_lora)\.(?P<role>down|up)\.weight",
        r"(?P<module>.+?)(_lora)?\.(?P<role>alpha)",
        r"(?P<module>.+?)\.lora_(?P<role>magnitude)_vector(\.(?P<adapter>[\w-]+?))?(\.weight)?",
        r"(?P<module>.+?)\.(?P<role>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2)(\.(?P<adapter>[\w-]+))?",
        r"(?P<module>.+?)\.(?P<role>scalar|dora_scale|diff|diff_b|w_norm|b_norm)",
    )
)
_ROLES = {"A": "down", "B": "up"}
# Relatives of LoRA that are no sum of a weight and a change.
_NOT_READ = {
    "OFT": re.compile(r"\.(b?oft)_"),
    "IA3": re.compile(r"\.on_input$|\.ia3_"),
    "VeRA": re.compile(r"(^|\.)vera_"),
    "AdaLoRA": re.compile(r"\.lora_E\b"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "embedding": re.compile(r"\.lora_embedding_"),
    "trained bias": re.compile(r"(?<!\.lora_B)\.bias$"),  # PEFT's bias="all" and "lora_only"
}
# How the names of a network's layers begin, with underscores for dots.
_FLAT_PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_text_model_": "text_encoder",
    "lycoris_": "unet",
    "lora_te_text_model_": "text_encoder",
    "lora_te1_text_model_": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
}
# Textual inversions that OneTrainer puts beside the layers that were trained with them.
_EMBEDDING = re.compile(r"bundle_emb\.(?P<word>.+)\.(string_to_param\.\*|emb_params|clip_[lg])")
_PREFIXES = re.compile(
    r"(base_model\.model\.|module\.|model\.|diffusion_model\.|unet\.|transformer\.|text_encoder\."
    r"|text_encoders\.clip_l\.|clip_l\.|text_model\.)*"
)
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class LoraMerge:
    """LoRA layers by the weight that they change, over the states of the networks.

    All layers of a weight change what it was before any of them, are added to it in float32, and rounded once: their
    order does not matter.
    """

    unet: State
    text_encoder: State
    layers: dict[tuple[str, str], list[tuple[LoraLayer, float, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states: dict[str, State] = {"unet": self.unet, "text_encoder": self.text_encoder}
        self._modules = {
            part: {name.removesuffix(".weight") for name in state if name.endswith(".weight")}
            for part, state in self.states.items()
        }
        self._original = _original_names(self._modules["unet"])
        # kohya writes underscores for dots, which cannot be undone without the names.
        self._flat = {part: {n.replace(".", "_"): n for n in names} for part, names in self._modules.items()}
        self._flat["unet"] |= {n.replace(".", "_"): own for n, own in self._original.items()}

    def read(self, lora: str | Path, scale: float, on_fetch: OnFetch | None = None) -> Origin:
        """Add the layers of a file, times `scale`.

        Raises:
            EmtError: if the file cannot be read, changes nothing, or naming keys that are no part of a layer,
                belong to no weight or do not fit it.
        """
        path = find_lora(lora, on_fetch)
        checkpoint = _without_embeddings(read_checkpoint(path), path)
        settings, files = peft_settings(checkpoint, path)
        if not (kind := describe(checkpoint.state)).startswith(LORA):
            raise wrong_kind(path, kind, LORA)
        problems: dict[str, list[str]] = {}
        found = _find_layers(checkpoint.state, problems)
        counts, kinds, zero = dict.fromkeys(self.states, 0), Counter[str](), True
        names: dict[tuple[str, str, str], str] = {}
        for (module, adapter), layer in found.items():
            target = self._target(module)
            if target is None:
                problems.setdefault("target", []).append(f"no such weight in the model: {module}")
                continue
            part, name = target
            if (other := names.setdefault((part, name, adapter), module)) != module:
                problems.setdefault("twice", []).append(f"one weight by two names: {other}, {module}")
                continue
            if problem := self._problem(layer, module, part, name):
                problems.setdefault(problem.split(":")[0], []).append(problem)
                continue
            try:
                factor = _factor(layer, settings, part, module)
            except ValueError as error:
                problems.setdefault("alpha", []).append(f"{error}: {module}")
                continue
            self.layers.setdefault((part, name), []).append((layer, factor, scale))
            zero = zero and layer.is_zero(factor)
            counts[part] += 1
            kinds[layer.kind] += 1
        if problems:
            raise _misfit(path, checkpoint, problems)
        if zero:
            raise untrained(path, sum(counts.values()))
        note = f"scale {scale:g}; {counts['unet']} layers of the UNet, {counts['text_encoder']} of the text encoder"
        if kinds.keys() != {"LoRA"}:
            note += f"; {', '.join(sorted(kinds))}"
        return Origin("LoRA", str(lora), files, note, checkpoint.dropped)

    def _problem(self, layer: LoraLayer, module: str, part: str, name: str) -> str:
        """A line on what is wrong with a layer of a weight; empty if nothing is."""
        state = self.states[part]
        if missing := layer.missing():
            if layer.family != "LoRA":
                there = next(role for role in layer.tensors if role.startswith(("hada_", "lokr_")))
                shape = tuple(layer.tensors[there].shape)
                return f"unexpected: {module}.{there} {shape} without {', '.join(missing)}"
            return f"missing: the {missing[0]} half of {module}"
        if unread := layer.unread():
            return f"unexpected: {module}.{unread[0]} beside {layer.family}"
        if layer.rank == 0:
            return f"rank 0: {module}"
        bias, weight = layer.bias_change(1.0), state[f"{name}.weight"]
        if not layer.fits(weight.shape):
            shapes = " × ".join(str(tuple(t.shape)) for t in reversed(list(layer.tensors.values())) if t.ndim)
            if {"down", "up"} <= layer.tensors.keys():
                shapes = f"{tuple(layer.tensors['up'].shape)} × {tuple(layer.tensors['down'].shape)}"
            return f"wrong shape: {module} is {shapes}, the weight {tuple(weight.shape)}"
        if bias is not None and f"{name}.bias" not in state:
            # PEFT trains one there, too, and cannot merge it either; one that is zero does nothing.
            return f"no such bias in the model: the layer {module} has none" if bool(bias.any()) else ""
        if bias is not None and state[f"{name}.bias"].shape != bias.shape:
            return f"wrong shape: the bias of {module} is {tuple(bias.shape)}"
        return ""

    def _target(self, module: str) -> tuple[str, str] | None:
        """The network and the layer that a module's name is of."""
        for prefix, part in _FLAT_PREFIXES.items():
            if module.startswith(prefix):
                name = self._flat[part].get(module.removeprefix(prefix).replace(".", "_"))
                return (part, name) if name else None
        module = module[_PREFIXES.match(module).end() :]  # type: ignore[union-attr]  # an empty match is one, too
        module = published_motion_name(module.replace(".processor.", "."))
        head, _, last = module.rpartition(".")
        for part, name in (
            ("unet", module),
            ("unet", f"{module}.0"),  # `to_out` for `to_out.0`
            ("unet", self._original.get(module, "")),
            ("text_encoder", module),
            ("text_encoder", f"{head}.{_TEXT_NAMES.get(last, last)}"),
        ):
            if name in self._modules[part]:
                return part, name
        return None

    def apply(self, dtype: torch.dtype) -> list[tuple[str, str]]:
        """Replace every changed weight and bias by the sum, in `dtype`; returns their networks and names.

        A layer that denoising has of its own in the place of the backbone's changes as that one does.
        """
        changed = []
        for (part, name), layers in self.layers.items():
            for own in (name, f"denoising.{name}"):
                sums = _sums(self.states[part], own, layers)
                self.states[part].update((key, value.to(dtype)) for key, value in sums.items())
                changed += [(part, key) for key in sums]
        return changed


def _sums(state: State, name: str, layers: Sequence[tuple[LoraLayer, float, float]]) -> State:
    """Weight and bias of a layer with its changes, in float32; without those that the state lacks."""
    sums = {key: state[key].float() for key in (f"{name}.weight", f"{name}.bias") if key in state}
    weight = sums.get(f"{name}.weight")
    changed = set()
    for layer, factor, scale in layers:
        changes = {f"{name}.bias": layer.bias_change(factor)}
        if weight is not None:
            changes[f"{name}.weight"] = layer.change(weight, factor)
        for key, change in changes.items():
            if change is not None and key in sums:
                sums[key] = sums[key] + scale * change
                changed.add(key)
    return {key: sums[key] for key in sums if key in changed}


def find_lora(lora: str | Path, on_fetch: OnFetch | None = None) -> Path:
    """The file of a LoRA that is given by path, by hf:// address, or as a PEFT adapter's folder.

    Raises:
        EmtError: if there is none.
    """
    path = locate(lora, "LoRA", _peft_files, on_fetch=on_fetch)
    if not path.is_dir():
        return path
    weights = _peft_files([file.name for file in path.glob("*") if file.is_file()])
    if not weights:
        raise folder_instead(path, "Give a LoRA's file, or the folder of one.")
    return path / weights[0]


def _peft_files(names: Sequence[str]) -> list[str]:
    """The files to read of a PEFT adapter's folder, among all its names."""
    weights = next((n for n in ("adapter_model.safetensors", "adapter_model.bin") if n in names), None)
    return [weights, *(n for n in names if n == "adapter_config.json")] if weights else []


def _without_embeddings(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """A file without the textual inversions in it, which are no layers; of their words a warning says so."""
    words = {name: match["word"] for name in checkpoint.state if (match := _EMBEDDING.fullmatch(name))}
    if not words:
        return checkpoint
    logger.warning(
        "the LoRA %s brings textual inversions (%s), which are not read with it: give them by --embedding WORD=FILE",
        path.name,
        ", ".join(sorted({*words.values()})[:8]),
    )
    layers = {name: tensor for name, tensor in checkpoint.state.items() if name not in words}
    return Checkpoint(layers, checkpoint.metadata, [*checkpoint.dropped, *words])


def _find_layers(state: Mapping[str, Tensor], problems: dict[str, list[str]]) -> dict[tuple[str, str], LoraLayer]:
    """The layers of a file by their modules' and their adapters' names; adds lines on keys that are no part of one."""
    found: dict[tuple[str, str], LoraLayer] = {}
    for key, tensor in state.items():
        match = next((match for pattern in _KEYS if (match := pattern.fullmatch(key))), None)
        if match is None:
            problems.setdefault("unexpected", []).append(f"unexpected: {key} {tuple(tensor.shape)}")
            continue
        role = _ROLES.get(match["role"], match["role"])
        layer = found.setdefault((match["module"], match.groupdict().get("adapter") or ""), LoraLayer())
        if problem := tensor_problem(key, tensor, is_number=role in ("alpha", "scalar")):
            problems.setdefault(problem[len(key) :], []).append(problem)
        elif role in layer.tensors or (role == "alpha" and layer.alpha is not None):
            problems.setdefault("twice", []).append(f"the {role} of one layer by two names, one of them {key}")
        elif role == "alpha":
            layer.alpha = float(tensor)
        else:
            layer.tensors[role] = tensor
    share_alphas(found)
    # An alpha alone, of a layer that was pruned, changes nothing.
    return {name: layer for name, layer in found.items() if layer.tensors}


def _factor(layer: LoraLayer, settings: Mapping[str, Any], part: str, module: str) -> float:
    """Scale of a layer's change: alpha / rank, by the file, or by PEFT's settings; 1 without either.

    Raises:
        ValueError: if a setting is none that PEFT writes.
    """
    own = {key.removeprefix(f"{part}."): value for key, value in settings.items()}
    rank = layer.rank
    if rank is None and own.get("peft_type") == "LOKR" and isinstance(own.get("r"), int) and own["r"] > 0:
        rank = own["r"]  # LyCORIS does not scale full matrices, PEFT does
    if rank is None:
        return 1.0
    if layer.alpha is not None:
        return layer.alpha / rank
    return peft_scale(own, module, rank)


def _misfit(path: Path, checkpoint: Checkpoint, problems: Mapping[str, Sequence[str]]) -> EmtError:
    """The error of a LoRA that does not fit, in a few lines, with a guess at what it is."""
    count = sum(map(len, problems.values()))
    unread = next((name for name, keys in _NOT_READ.items() if any(keys.search(key) for key in checkpoint.state)), None)
    version = other_version(checkpoint.state, checkpoint.metadata)
    guess = f": it holds {unread} layers, which are not read" if unread else ""
    if version:
        guess = f": it looks like one of {version}"
    return EmtError(
        f"the LoRA {path} does not fit this model, {differ(count)}{guess}" + shorten(list(problems.values())),
        "Give a LoRA, LoHa, LoKr or DoRA of Stable Diffusion 1.5, or an AnimateDiff motion LoRA.",
    )


def _original_names(modules: set[str]) -> dict[str, str]:
    """Names of a UNet's layers in the original code → the published ones, for the layers that are there."""
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    stem = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    counts = [int(m[1]) for n in modules if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", n))]
    layers = 1 + max(counts, default=-1)
    names = {original: own for own, original in stem.items() if own in modules}
    for own in modules:
        match = re.fullmatch(r"(down|up|mid)_blocks?\.?(\d*)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", own)
        if match is None:
            continue
        where, level, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if kind == "resnets":
            rest = resnet.get(rest, rest)
        if where == "mid":
            block = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
        elif kind == "downsamplers":
            block, rest = f"input_blocks.{(layers + 1) * (level + 1)}.0", "op"
        elif kind == "upsamplers":
            attended = f"up_blocks.{level}.attentions.0.proj_in" in modules
            block = f"output_blocks.{(layers + 1) * level + layers}.{1 + attended}"
        else:
            first = 1 + (layers + 1) * level if where == "down" else (layers + 1) * level
            side = "input" if where == "down" else "output"
            block = f"{side}_blocks.{first + index}.{int(kind == 'attentions')}"
        names[f"{block}.{rest}"] = own
    return names
