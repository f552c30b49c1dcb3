"""Kinds of files that people have for Stable Diffusion, distinguished by the names and shapes in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from emt.checkpoints import Checkpoint, read_checkpoint
from emt.errors import EmtError

SINGLE_FILE = "Stable Diffusion 1.5 in the original layout"
MOTION_MODULE = "a motion module"
ADAPTER = "an adapter"
LORA = "a LoRA"
VAE = "a VAE"
CONTROL = "a SparseCtrl network"
EMBEDDING = "a textual inversion embedding"
UNET = "a UNet in diffusers layout"

_HINTS = {
    SINGLE_FILE: "Give a file with keys such as model.diffusion_model.…",
    MOTION_MODULE: "Give AnimateDiff's mm_sd_v15_v2.ckpt or v3_sd15_mm.ckpt, or a diffusers MotionAdapter.",
    ADAPTER: "Give EfficientMT's checkpoint, or one of emt train.",
    LORA: "Give a LoRA of Stable Diffusion 1.5 or an AnimateDiff motion LoRA.",
    VAE: "Give a VAE of Stable Diffusion 1.5, such as vae-ft-mse-840000-ema-pruned.safetensors.",
    CONTROL: "Give AnimateDiff's v3_sd15_sparsectrl_rgb.ckpt or v3_sd15_sparsectrl_scribble.ckpt.",
    EMBEDDING: "Give a textual inversion embedding of Stable Diffusion 1.5.",
}

# Names of LoRA layers and their relatives, in every dialect.
LORA_NAMES = re.compile(
    r"\.?lora_(A|B|E|down|up|mid|embedding_[AB])\b|[._]lora(_linear_layer)?\.(down|up)\.|\.hada_[wt]\d|\.lokr_[wt]\d"
    r"|\.(oft|boft)_\w|\.ia3_l\b|(^|\.)vera_\w|\.on_input$|^(lora|lycoris)_[a-z0-9_]+\.(diff(_b)?|[wb]_norm|[ab][12]\.weight)$|\.lora_magnitude_vector"
)
SDXL, SD2 = "Stable Diffusion XL (SDXL)", "Stable Diffusion 2"

_WIDTHS = {2048: SDXL, 1024: SD2}
"""Widths of the text that attentions of other versions read."""

_SIGNS = (
    (r"(^|\.)(conditioner\.embedders|add_embedding|label_emb)\.|lora_te2_|text_encoder_2\.", SDXL),
    (r"[._]\d+[._]transformer_blocks[._][1-9]\d*[._]", SDXL),
    (r"^cond_stage_model\.model\.", SD2),
    (r"(^|[._])(double|single)_(transformer_)?blocks[._]", "Flux"),
    (r"(^|[._])joint_(transformer_)?blocks[._]", "Stable Diffusion 3"),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]", "Wan"),
    (r"^((base_model\.model|transformer|diffusion_model|model)\.)*transformer_blocks\.\d", "a diffusion transformer"),
)


def read_kind(
    path: Path, *wanted: str, own: Callable[[Path, Checkpoint], Checkpoint] = lambda path, whole: whole
) -> Checkpoint:
    """Read a file that must be of a kind.

    Args:
        path: of the file.
        *wanted: kinds that serve, of the constants of this module.
        own: takes the network that is meant out of the file, before its kind is looked at.

    Raises:
        EmtError: if it cannot be read or is of another kind, which the error names.
    """
    checkpoint = own(path, read_checkpoint(path))
    if (kind := describe(checkpoint.state)) not in wanted:
        raise wrong_kind(path, kind, wanted[0])
    return checkpoint


def one_prefix(path: Path, kind: str, prefixes: Counter[str]) -> str:
    """The prefix of a network's layers in a file; of several copies, that of the one that is no average.

    Args:
        path: of the file.
        kind: of the network, of the constants of this module.
        prefixes: how many layers each is before.

    Raises:
        EmtError: if it cannot be known which copy is meant.
    """
    # Layers that denoising has of its own in a network of this program are no copy.
    copies = {p: n for p, n in prefixes.items() if not re.search(r"(^|[._])(ema|averaged?)([._]|$)|denoising\.$", p)}
    most = max((copies or prefixes).values())
    found = [prefix for prefix, count in (copies or prefixes).items() if count == most]
    if len(found) > 1:
        raise EmtError(
            f"{path} holds {kind} {len(found)} times: below {', '.join(sorted(found))}", "Give a file with one of them."
        )
    return found[0]


def wrong_kind(path: Path, kind: str, wanted: str) -> EmtError:
    """The error of a file that is of another kind than what it was given as."""
    return EmtError(f"{path} is {kind}, not {wanted}", _HINTS[wanted])


def describe(state: Mapping[str, Tensor]) -> str:
    """The kind of a file, in the words of this module's constants and others, by its keys."""

    def any_name(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in state)

    other = other_version(state)
    of = f" of {other}" if other else ""
    if any(LORA_NAMES.search(name) for name in state):
        return LORA + of
    alone = any_name(r"^(diffusion_model\.)?input_blocks\.0\.0\.") and not any_name("zero_convs")
    if alone or any_name(r"^model\.diffusion_model\."):
        return f"a Stable Diffusion of another version (2 or XL): {other}" if other else SINGLE_FILE
    if any_name(r"^(control_model\.|controlnet_)|zero_convs|input_hint_block"):
        return CONTROL if any_name(r"motion_modules\.\d+\.") else "a ControlNet"
    if any_name(r"\.temporal_attentions\."):
        return f"HotshotXL, a motion module of {SDXL}"
    if any_name(r"motion_modules\.\d+\.") and not any_name(r"\.scaler\."):
        return MOTION_MODULE
    if any_name(r"\.scaler\."):
        return ADAPTER
    if any_name(r"^(emb_params|string_to_param\.|clip_[lg])$|^<.+>$") or (len(state) == 1 and _is_vectors(state)):
        return EMBEDDING
    if any_name(r"^down_blocks\."):
        return UNET.replace("UNet", f"UNet{of}")
    if any_name(r"^(encoder|decoder|first_stage_model)\."):
        return VAE
    if any_name(r"(^|\.)text_model\.(encoder|embeddings)\."):
        return "a text encoder"
    if other:
        return f"a file of {other}"
    return f"of an unknown kind (it begins with {min(state)})"


def _is_vectors(state: Mapping[str, Tensor]) -> bool:
    return all(tensor.ndim <= 2 and tensor.shape[-1:] == (768,) for tensor in state.values())


def other_version(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str | None:
    """The network that a file is of, if it shows signs of another one than Stable Diffusion 1.5."""
    named = f"{(metadata or {}).get('ss_base_model_version', '')} {(metadata or {}).get('modelspec.architecture', '')}"
    for sign, version in (("xl", SDXL), ("sd_v2", SD2), ("diffusion-v2", SD2), ("flux", "Flux")):
        if sign in named.lower():
            return version
    for pattern, version in _SIGNS:
        if any(re.search(pattern, name) for name in state):
            return version
    text = re.compile(r"attn2[._](processor[._])?to_[kv](?!.*(up\b|lora_B|lora_up)).*\.weight$")
    widths = {tensor.shape[1] for name, tensor in state.items() if tensor.ndim == 2 and text.search(name)}
    return next((version for width, version in _WIDTHS.items() if width in widths), None)


def unet_guess(state: Mapping[str, Tensor]) -> str:
    """Description of a file's UNet that does not fit, for a message; empty if nothing is known."""
    if version := other_version(state):
        return f"it looks like {version}"
    for name in ("conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"):
        channels = state[name].shape[1] if name in state and state[name].ndim == 4 else 4
        if channels != 4:
            known = {9: "an inpainting model", 8: "InstructPix2Pix, which edits images"}
            return f"it reads {channels} channels and looks like {known.get(channels, 'another model')}"
    return ""
