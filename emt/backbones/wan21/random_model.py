"""Model folders of Wan's kind with random weights, for tests and benchmarks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from emt.backbones.wan21.import_weights import DEFAULTS, flow_scheduler
from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.checkpoints import allocate
from emt.model_folder import model_card, new_folder
from emt.pipeline import MotionTransferPipeline

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "transformer": {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 64,
            "num_layers": 3,
            "reference_blocks": (1, 2),
            "adapter_rank": 4,
            "scaler_channels": 8,
        },
        "vae": {"base_dim": 8, "num_res_blocks": 1},
        "text": {"d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
        "defaults": {"frames": 9, "height": 64, "width": 64, "steps": 4},
    },
    "1.3b": {
        "transformer": {},
        "vae": {"base_dim": 96, "num_res_blocks": 2},
        # Its own size would be 5.7 billion weights, of which nothing is timed or measured.
        "text": {"d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 8},
        "defaults": {},
    },
}


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw weights of variance 1/inputs in place; norms get weight 1, biases are 0, additions of the adapter show."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1 and not name.endswith("gamma"):
            p.normal_(generator=generator).div_(math.sqrt(math.prod(p.shape[1:])))
        else:
            p.fill_(1.0 if name.endswith(("weight", "gamma")) else 0.0)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of T5's kind that knows a few words and single bytes, and so spells any prompt."""
    words = ["▁", "▁a", "▁the", "▁in", "▁of", "▁on", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -float(len(words))) for word in words)]
    pieces += [(f"<0x{byte:02X}>", -100.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def random_model(
    folder: str | Path, *, size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> Path:
    """Write a model folder with random weights: the same ones for the same arguments.

    Args:
        folder: to write; must not exist or be empty.
        size: "tiny" makes a clip in about a second on one CPU core; "1.3b" has every width of Wan 2.1 T2V-1.3B, but a
            text encoder of two small layers.
        dtype: of the stored weights; what diffusers keeps so, and the VAE, are stored in float32.
        seed: of the weights.
        **options: arguments of `WanMotionTransferTransformer`, and defaults of the model that differ from `DEFAULTS`.

    Raises:
        EmtError: if the folder is in use.
        TypeError: for an unknown argument.
    """
    chosen = _SIZES[size]
    defaults = chosen["defaults"] | {name: options.pop(name) for name in DEFAULTS if name in options}
    transformer = allocate(lambda: WanMotionTransferTransformer(**chosen["transformer"] | options), torch.float32)
    vae = allocate(lambda: AutoencoderKLWan(**chosen["vae"], z_dim=transformer.config.in_channels), torch.float32)
    words = byte_tokenizer()
    text = UMT5Config(
        vocab_size=len(words), d_model=transformer.config.text_dim, feed_forward_proj="gated-gelu", **chosen["text"]
    )
    encoder = allocate(lambda: UMT5EncoderModel(text), torch.float32)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight
    for i, model in enumerate((transformer, vae, encoder)):
        draw_weights(model, seed + i)
    for model in (transformer, encoder):
        for name, p in model.named_parameters():
            if model is encoder or not any(part in name for part in transformer._keep_in_fp32_modules):
                p.data = p.data.to(dtype)
    pipe = MotionTransferPipeline(vae, encoder, words, transformer, flow_scheduler(), **DEFAULTS | defaults)
    with new_folder(Path(folder), overwrite=False) as partial:
        pipe.save_pretrained(partial)
        card = model_card("Random weights", f"Nothing here is trained: size `{size}`, seed {seed}.")
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)
