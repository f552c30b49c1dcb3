"""Tokenizer and text encoder of the small model: whole words in, CLIP's text model behind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from emt.synthetic.renderer import COLOURS, SUBJECTS, words
from emt.synthetic.scenes import PLACES

UNKNOWN, START, END = "[UNK]", "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 16


def make_tokenizer(vocabulary: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, lower-cased, punctuation ignored; by default of every word that captions use.

    Texts are framed and padded as CLIP's are, the end-of-text token being the highest id and the padding.
    """
    names = [UNKNOWN, START, *(words() if vocabulary is None else vocabulary), END]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s-]"), " ")]
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, names.index(START)), (END, names.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_text_encoder(width: int, layers: int, vocabulary: Iterable[str] | None = None) -> CLIPTextModel:
    """CLIP's text model over the words of `make_tokenizer`."""
    tokenizer = make_tokenizer(vocabulary)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def name_portably(model: Path) -> None:
    """Have a saved model folder name the tokenizer's class as every version of transformers knows it, and no folder."""
    names = {
        model / "tokenizer" / "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        model / "model_index.json": {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]},
    }
    for path, name in names.items():
        path.write_text(json.dumps(json.loads(path.read_text()) | name, indent=2) + "\n")
    autoencoder = model / "vae" / "config.json"
    config = json.loads(autoencoder.read_text())
    config.pop("_name_or_path", None)  # where the stage had left it
    autoencoder.write_text(json.dumps(config, indent=2) + "\n")


def write_vocabulary(model: Path) -> None:
    """Have a model folder list the phrases of its captions by kind, for who writes prompts."""
    groups = {"subjects": sorted(SUBJECTS), "colours": list(COLOURS), "scenes": sorted(PLACES.values())}
    (model / "vocabulary.json").write_text(json.dumps(groups, indent=2) + "\n")
