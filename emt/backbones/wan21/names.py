"""Names of Wan's weights: original ones to those of diffusers and transformers, and which network they are of.

Names that are already diffusers', and unknown ones, pass as they are: the check of keys names what does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from emt.checkpoints import State
from emt.errors import EmtError

_TRANSFORMER = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_BLOCK = {
    "norm3": "norm2",  # of cross-attention; the other two norms have no weights
    "modulation": "scale_shift_table",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def transformer_module(name: str) -> str:
    """A module of the transformer, or a parameter without a module: original name → diffusers'."""
    if name in _TRANSFORMER:
        return _TRANSFORMER[name]
    if match := re.fullmatch(r"(blocks\.\d+\.)(self|cross)_attn\.(\w+)", name):
        attention = "attn1" if match[2] == "self" else "attn2"
        return f"{match[1]}{attention}.{_ATTENTION.get(match[3], match[3])}"
    if match := re.fullmatch(r"(blocks\.\d+\.)(.+)", name):
        return match[1] + _BLOCK.get(match[2], match[2])
    return name


def original_module(name: str) -> str:
    """A module of the transformer, or a parameter without a module: diffusers' name → original."""
    for original, new in _TRANSFORMER.items():
        if name == new:
            return original
    if match := re.fullmatch(r"(blocks\.\d+\.)attn([12])\.(.+)", name):
        attention = "self_attn" if match[2] == "1" else "cross_attn"
        return f"{match[1]}{attention}.{_inverse(_ATTENTION).get(match[3], match[3])}"
    if match := re.fullmatch(r"(blocks\.\d+\.)(.+)", name):
        return match[1] + _inverse(_BLOCK).get(match[2], match[2])
    return name


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: original for original, new in names.items()}


def transformer_name(name: str) -> str:
    """A weight of the transformer: original name → diffusers'."""
    module, dot, kind = name.rpartition(".")
    return transformer_module(module) + dot + kind if kind in ("weight", "bias") else transformer_module(name)


_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_VAE = [
    (r"conv1\.(\w+)", r"quant_conv.\1"),
    (r"conv2\.(\w+)", r"post_quant_conv.\1"),
    (r"(encoder|decoder)\.conv1\.(\w+)", r"\1.conv_in.\2"),
    (r"(encoder|decoder)\.head\.0\.(\w+)", r"\1.norm_out.\2"),
    (r"(encoder|decoder)\.head\.2\.(\w+)", r"\1.conv_out.\2"),
    (r"(encoder|decoder)\.middle\.1\.(.+)", r"\1.mid_block.attentions.0.\2"),
    (r"(encoder|decoder)\.middle\.0\.(.+)", r"\1.mid_block.resnets.0.\2"),
    (r"(encoder|decoder)\.middle\.2\.(.+)", r"\1.mid_block.resnets.1.\2"),
    (r"encoder\.downsamples\.(.+)", r"encoder.down_blocks.\1"),
]


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Weights of the VAE: original names → diffusers'."""
    names = list(names)
    # The original counts the decoder's layers through all levels; the last layer of each but the last level upsamples.
    upsampling = [int(m[1]) for n in names if (m := re.match(r"decoder\.upsamples\.(\d+)\.resample\.", n))]
    layers = min(upsampling, default=0) + 1

    def renamed(name: str) -> str:
        for pattern, new in _VAE:
            if match := re.fullmatch(pattern, name):
                name = match.expand(new)
                break
        if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", name):
            level, layer = divmod(int(match[1]), layers)
            part = f"resnets.{layer}" if layer < layers - 1 else "upsamplers.0"
            name = f"decoder.up_blocks.{level}.{part}.{match[2]}"
        name = re.sub(r"\.residual\.(\d)\.", lambda m: f".{_RESIDUAL.get(m[1], m[0])}.", name)
        return name.replace(".shortcut.", ".conv_shortcut.")

    return {name: renamed(name) for name in names}


_UMT5 = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def umt5_name(name: str) -> str:
    """A weight of the text encoder: original name → transformers'."""
    if name in ("token_embedding.weight", "encoder.embed_tokens.weight"):
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    if (match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)) and match[2] in _UMT5:
        return f"encoder.block.{match[1]}.{_UMT5[match[2]]}.weight"
    return name


def renamed(state: Mapping[str, Tensor], name_of: Callable[[str], str], where: str) -> State:
    """A state under new names.

    Raises:
        EmtError: if a weight is there under both of its names, and they differ.
    """
    result: State = {}
    for name, tensor in state.items():
        new = name_of(name)
        if new in result and not (result[new].shape == tensor.shape and bool((result[new] == tensor).all())):
            raise EmtError(f"{where} has {new} twice, under an original name and diffusers'", "Give a file with one.")
        result[new] = tensor
    return result


# Networks of the family, distinguished by words in their names of weights.
_FAMILY = {
    "vace_blocks": "Wan 2.1 VACE",
    "face_adapter": "Wan 2.2 Animate",
    "motion_encoder": "Wan 2.2 Animate",
    "audio_injector": "Wan 2.2 S2V, which is driven by sound",
    "casual_audio_encoder": "Wan 2.2 S2V, which is driven by sound",
    "control_adapter": "Wan Fun Camera, which is driven by a camera's path",
    "ref_conv": "Wan Fun Control",
    "cam_encoder": "ReCamMaster",
    "img_emb": "Wan image to video",
    "image_embedder": "Wan image to video",
    "k_img": "Wan image to video",
    "add_k_proj": "Wan image to video",
}
SUPPORTED = "Give Wan 2.1 text to video: T2V-1.3B or T2V-14B."


def check_is_text_to_video(state: Mapping[str, Tensor], where: str) -> None:
    """Raise an `EmtError` that names the network if `state`, a transformer by diffusers' names, is of another kind."""
    if any(re.search(r"lora_|\.diff(_[bm])?$", name) for name in state):
        raise EmtError(f"{where} is a LoRA, not a network", f"Give it by --lora. {SUPPORTED}")
    if any(name.startswith(("model.diffusion_model.", "down_blocks.", "first_stage_model.")) for name in state):
        raise EmtError(f"{where} is a Stable Diffusion", SUPPORTED)
    if any(name.startswith(("encoder.", "decoder.")) for name in state):
        part = "text encoder" if "shared.weight" in state else "VAE"
        raise EmtError(f"{where} is a {part}, not a transformer", SUPPORTED)
    for word, kind in _FAMILY.items():
        if any(word in name for name in state):
            raise EmtError(f"{where} is {kind}, which is not supported", SUPPORTED)
    patches = state.get("patch_embedding.weight")
    if patches is None or patches.ndim != 5 or not patches.numel():
        raise EmtError(f"{where} is not a transformer of Wan: it has no patch_embedding.weight", SUPPORTED)
    if patches.shape[1] == 48 and patches.shape[0] == 3072:
        raise EmtError(f"{where} is Wan 2.2 TI2V-5B, which is not supported", SUPPORTED)
    out = state.get("proj_out.bias")
    if out is not None and patches.shape[1] * patches[0, 0].numel() != out.numel():
        channels, given = patches.shape[1], out.numel() // patches[0, 0].numel()
        raise EmtError(
            f"{where} takes {channels} latent channels and gives {given}: it is conditioned on images or video, which "
            "is not supported",
            SUPPORTED,
        )
