"""Encodings of prompts: what diffusers' pipeline of Wan would give, from disk where they are known."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from emt.backbones.wan21 import text
from emt.backbones.wan21.random_model import random_model
from emt.backbones.wan21.text import PromptEncoder, cleaned, encode_prompts, padded
from emt.errors import EmtError

PROMPTS = ["a cat", "", "the “fox” in &amp; on   the\nsnow, ünïcode 猫"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return random_model(tmp_path_factory.mktemp("wan") / "model")


@pytest.fixture(scope="module")
def parts(model):
    return AutoTokenizer.from_pretrained(model / "tokenizer"), UMT5EncoderModel.from_pretrained(model / "text_encoder")


@torch.no_grad()
def test_they_are_what_diffusers_encodes(parts):
    tokenizer, encoder = parts
    pipe = WanPipeline(tokenizer, encoder, vae=None, scheduler=None)
    expected = pipe._get_t5_prompt_embeds(PROMPTS, max_sequence_length=64, device=torch.device("cpu"))
    got = padded(encode_prompts(PROMPTS, tokenizer, encoder, 64), 64)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_prompts_are_cleaned_as_captions_were():
    assert cleaned("  a &amp;amp; b\n\t“c” ﬁne  ") == 'a & b "c" fine'


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(parts, caplog):
    tokenizer, encoder = parts
    with caplog.at_level(logging.WARNING):
        (encoding,) = encode_prompts(["a b c d e f g h"], tokenizer, encoder, 6)
    assert len(encoding) == 6
    assert "the model reads the first 6" in caplog.text


def opened(monkeypatch) -> list[str]:
    """Names of folders that a text encoder is opened from, from here on."""
    names = []
    original = UMT5EncoderModel.from_pretrained.__func__
    monkeypatch.setattr(
        text.UMT5EncoderModel,
        "from_pretrained",
        classmethod(lambda cls, path, **options: names.append(path) or original(cls, path, **options)),
    )
    return names


class TestCache:
    def test_the_encoder_is_opened_once_and_then_not_at_all(self, model, tmp_path, monkeypatch):
        names = opened(monkeypatch)
        first = PromptEncoder(model, tmp_path, "digest")
        expected = first([*PROMPTS, PROMPTS[0]])
        assert expected.shape == (4, 512, 32)
        assert torch.equal(expected[0], expected[3])
        first(PROMPTS[:1])
        again = PromptEncoder(model, tmp_path, "digest")
        assert torch.equal(again([*PROMPTS, PROMPTS[0]]), expected)
        assert names == [str(model / "text_encoder")]

    def test_another_model_or_prompt_is_encoded_anew(self, model, tmp_path, monkeypatch):
        names = opened(monkeypatch)
        PromptEncoder(model, tmp_path, "one")(["a cat"])
        PromptEncoder(model, tmp_path, "two")(["a cat"])
        PromptEncoder(model, tmp_path, "two")(["a cat", "a dog"])
        PromptEncoder(model, tmp_path, "two")(["  a   dog "])  # the same once cleaned
        assert len(names) == 3

    @pytest.mark.parametrize("damage", [b"", b"no safetensors"])
    def test_a_damaged_entry_is_made_again(self, model, tmp_path, damage):
        expected = PromptEncoder(model, tmp_path, "d")(["a cat"])
        (entry,) = tmp_path.iterdir()
        entry.write_bytes(damage)
        assert torch.equal(PromptEncoder(model, tmp_path, "d")(["a cat"]), expected)
        assert len(entry.read_bytes()) > 100

    def test_a_folder_that_cannot_be_written_costs_time_only(self, model, tmp_path, caplog):
        (tmp_path / "file").write_text("not a folder")
        encode = PromptEncoder(model, tmp_path / "file", "d")
        assert torch.equal(encode(["a cat"]), PromptEncoder(model, None, "d")(["a cat"]))
        assert "is not kept" in caplog.text

    def test_padding_is_not_stored(self, model, tmp_path):
        PromptEncoder(model, tmp_path, "d")(["a"])
        (entry,) = tmp_path.iterdir()
        assert entry.stat().st_size < 2000

    def test_the_encoder_is_gone_afterwards(self, model, tmp_path, monkeypatch):
        made = []
        original = UMT5EncoderModel.__init__

        def remember(self, *args, **kwargs):
            original(self, *args, **kwargs)
            made.append(weakref.ref(self))

        monkeypatch.setattr(UMT5EncoderModel, "__init__", remember)
        PromptEncoder(model, tmp_path, "d")(["a"])
        assert [encoder() for encoder in made] == [None]


def test_a_model_without_a_text_encoder(tmp_path):
    with pytest.raises(EmtError, match="cannot be opened"):
        PromptEncoder(tmp_path, None, "d")(["a"])
