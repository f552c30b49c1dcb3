"""Textual inversion embeddings (Gal et al. 2022, arXiv 2208.01618): words with vectors of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken
from torch import Tensor

from emt.backbones.sd15.checkpoint_kinds import EMBEDDING, SD2, SDXL, describe, wrong_kind
from emt.checkpoints import read_checkpoint
from emt.errors import EmtError
from emt.hub import OnFetch, locate

if TYPE_CHECKING:
    from emt.pipeline import MotionTransfer

_WIDTHS = {1024: SD2, 1280: SDXL}
_MOST = 1000.0  # of a value; vectors of words have about 0.1, those of words that were trained seldom 10


def read_embedding(given: str | Path, width: int = 768, on_fetch: OnFetch | None = None) -> Tensor:
    """Read the vectors of an embedding, (vectors, width), float32.

    The files of the web UI (`string_to_param`, or `emb_params` in safetensors) and those of diffusers (a tensor by its
    word).

    Args:
        given: path or hf:// address.
        width: of the text encoder's embeddings.
        on_fetch: called while it is fetched.

    Raises:
        EmtError: if it cannot be read, holds several words, or is of another network.
    """
    path = locate(given, "embedding", on_fetch=on_fetch)
    state = read_checkpoint(path).state
    if "clip_g" in state:
        raise EmtError(f"the embedding {path} is of {SDXL}", "Give one of Stable Diffusion 1.5.")
    kind = describe(state)
    other = kind != EMBEDDING and not kind.startswith("of an unknown kind")
    if other or any(tensor.ndim > 3 for tensor in state.values()):
        raise wrong_kind(path, kind, EMBEDDING)
    if len(state) != 1:
        raise EmtError(
            f"the embedding {path} holds {len(state)} words: {', '.join(sorted(state)[:8])}", "Give a file of one."
        )
    (vectors,) = state.values()
    if not vectors.numel() or not vectors.is_floating_point() or not torch.isfinite(vectors.float()).all():
        raise EmtError(f"the embedding {path} has no vectors, or some that are not finite", "Download it again.")
    if (most := float(vectors.detach().float().abs().max())) > _MOST:
        problem = f"the embedding {path} has values up to {most:.3g}; those of words are below 1"
        raise EmtError(problem, "Its training diverged: give one of an earlier step.")
    vectors = vectors.float().reshape(-1, vectors.shape[-1] if vectors.ndim else 1)
    if vectors.shape[1] != width:
        of = f", as {_WIDTHS[vectors.shape[1]]} has" if vectors.shape[1] in _WIDTHS else ""
        raise EmtError(
            f"the embedding {path} has width {vectors.shape[1]}{of}; the text encoder has {width}",
            "Give an embedding of the same model.",
        )
    return vectors


def add_embeddings(pipe: MotionTransfer, embeddings: Mapping[str, Tensor]) -> None:
    """Teach the tokenizer and text encoder of a pipeline words with vectors, (vectors, width) each, in place.

    Prompts name a word once for all of its vectors.

    Raises:
        EmtError: if the tokenizer has a word already, or two embeddings have the same.
    """
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    for name, vectors in embeddings.items():
        if name in tokenizer.get_vocab():
            raise EmtError(f"--embedding {name}=…: the model has a word {name!r}", "Give the embedding another name.")
        # The names by which diffusers' `maybe_convert_prompt` writes a word out.
        words = [name, *(f"{name}_{i}" for i in range(1, len(vectors)))]
        # Within other words it is not meant; signs such as <…> may stand beside any letter.
        alone = re.fullmatch(r"\w(.*\w)?", name) is not None
        tokenizer.add_tokens([AddedToken(word, single_word=alone) for word in words])
        old = encoder.get_input_embeddings()
        table = torch.nn.Embedding(max(len(tokenizer), old.num_embeddings), old.embedding_dim).to(old.weight)
        table.weight.data[: old.num_embeddings] = old.weight.data
        table.weight.data[tokenizer.convert_tokens_to_ids(words)] = vectors.to(old.weight)
        encoder.set_input_embeddings(table)
