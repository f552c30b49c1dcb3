"""LoRA files of any network: PEFT's settings and scales, alphas, checks of tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from emt.checkpoints import Checkpoint, read_config
from emt.errors import EmtError, first_line

# Ways in which PEFT begins the training of a LoRA, and takes out of the model's weights what the LoRA begins with.
_CHANGES_THE_BASE = re.compile(r"pissa|olora|corda|loftq|lora_?ga", re.IGNORECASE)
# Before the name of a module, which PEFT's patterns do not count to it.
_ROOTS = re.compile(r"(base_model\.model\.|module\.|unet\.|transformer\.|diffusion_model\.|text_encoder\.)*")


def peft_settings(checkpoint: Checkpoint, path: Path) -> tuple[dict[str, Any], list[Path]]:
    """PEFT's settings of a LoRA file, from its metadata or the configuration beside it, and the files read.

    Raises:
        EmtError: if they are damaged, of another method than LoRA, LoHa and LoKr, of DoRA and the file has no
            magnitudes, or of training that began with other weights than the model's.
    """
    settings, files = _peft_settings(checkpoint, path)
    for name, value in settings.items():
        last = name.rpartition(".")[2]
        if last == "peft_type" and isinstance(value, str) and value.upper() not in ("LORA", "LOHA", "LOKR"):
            raise EmtError(
                f"the LoRA {path} is none: it is {value:.40} by its configuration, which is not read",
                "Give a LoRA, LoHa, LoKr or DoRA.",
            )
        if last == "init_lora_weights" and isinstance(value, str) and _CHANGES_THE_BASE.match(value):
            raise EmtError(
                f"the LoRA {path} is of a model whose weights were changed before it was trained (init_lora_weights is"
                f" {value!r:.40})",
                "Have PEFT save it as a plain LoRA (path_initial_model_for_weight_conversion), and give that.",
            )
    of_dora = any(name.rpartition(".")[2] == "use_dora" and value is True for name, value in settings.items())
    if of_dora and not any("magnitude" in name or name.endswith(".dora_scale") for name in checkpoint.state):
        raise EmtError(
            f"the LoRA {path} is DoRA by its configuration (use_dora), but has no magnitudes",
            "Give the whole file, or the configuration that belongs to it.",
        )
    return settings, files


def _peft_settings(checkpoint: Checkpoint, path: Path) -> tuple[dict[str, Any], list[Path]]:
    beside = path.parent / "adapter_config.json"
    if path.name.startswith("adapter_model.") and beside.is_file():
        return read_config(beside)[0], [path, beside]
    text = checkpoint.metadata.get("lora_adapter_metadata", "{}")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EmtError(
            f"{path} has lora_adapter_metadata that is no JSON: {first_line(error)}", "Download it again."
        ) from error
    if not isinstance(settings, dict):
        raise EmtError(f"{path} has lora_adapter_metadata that is no JSON object", "Download it again.")
    return settings, [path]


class _WithAlpha(Protocol):
    alpha: float | None


def tensor_problem(key: str, tensor: Tensor, *, is_number: bool = False) -> str:
    """Reason why a tensor of a LoRA is none; empty if it is one.

    Args:
        key: its name.
        tensor: of a layer, or a single number.
        is_number: is a single number, which may be whole.
    """
    if is_number and tensor.numel() != 1:
        return f"{key} holds {tensor.numel()} numbers instead of one"
    whole = is_number and not tensor.is_complex() and tensor.dtype != torch.bool
    if not (tensor.is_floating_point() or whole) or not torch.isfinite(tensor.float()).all():
        return f"{key} holds {tensor.dtype} numbers that are not finite reals"
    return ""


def share_alphas(layers: Mapping[tuple[str, str], _WithAlpha]) -> None:
    """Give the layers of a LoRA, by module and adapter, the alpha of their module, whose key never names an adapter."""
    for (module, _), layer in layers.items():
        if layer.alpha is None and (module, "") in layers:
            layer.alpha = layers[module, ""].alpha


def untrained(path: Path, layers: int) -> EmtError:
    """Error of a LoRA of whose layers none changes a weight."""
    return EmtError(
        f"the LoRA {path} changes nothing: "
        + (f"all of its {layers} layers are zero" if layers else "it has no layer"),
        "It was saved before it was trained, or its alphas are 0: give a trained one, or leave it out.",
    )


def peft_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Scale of a layer's change by PEFT: alpha / rank, or alpha / √rank; 1 if its settings do not say.

    Args:
        settings: of one network.
        module: name of the layer.
        rank: of the change.

    Raises:
        ValueError: if a setting is none that PEFT writes.
    """
    alpha = settings.get("lora_alpha", settings.get("alpha", rank))
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("alpha_pattern is no object")
    for pattern, value in patterns.items():
        if _matches(pattern, module):
            alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha!r:.40}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") is True else rank)


def _matches(pattern: str, module: str) -> bool:
    """Return whether a pattern of PEFT's, a module's name or the end of one as a regular expression, is of a module."""
    # An expression with nested repetition takes for ever on purpose; PEFT's patterns are names.
    if len(re.findall(r"[*+?{]", pattern)) > 3 or len(pattern) > 300:
        raise ValueError(f"the pattern {pattern!r:.40} is not read")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", _ROOTS.sub("", module, count=1)) is not None
    except (re.error, RecursionError, OverflowError):
        raise ValueError(f"the pattern {pattern!r:.40} is no regular expression") from None
