"""Encodings of prompts: what diffusers' pipeline of Wan would give, from disk where they are known."""

from __future__ import annotations

import logging
import os
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from emt import prompts
from emt.backbones.wan21.random_model import random_model
from emt.cache import ContentIndex
from emt.errors import EmtError
from emt.prompts import PromptEncoder, cleaned, encode_prompts, padded

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
        UMT5EncoderModel,
        "from_pretrained",
        classmethod(lambda cls, path, **options: names.append(path) or original(cls, path, **options)),
    )
    return names


class TestCache:
    @pytest.fixture
    def index(self, tmp_path) -> ContentIndex:
        return ContentIndex(tmp_path / "index")

    @pytest.fixture
    def cache(self, tmp_path) -> Path:
        return tmp_path / "cache"

    def test_the_encoder_is_opened_once_and_then_not_at_all(self, model, cache, index, monkeypatch):
        names = opened(monkeypatch)
        first = PromptEncoder(model, cache, index)
        expected = first([*PROMPTS, PROMPTS[0]])
        assert expected.shape == (4, 512, 32)
        assert torch.equal(expected[0], expected[3])
        first(PROMPTS[:1])
        again = PromptEncoder(model, cache, index)
        assert torch.equal(again([*PROMPTS, PROMPTS[0]]), expected)
        assert names == [str(model / "text_encoder")]

    def test_prompts_are_encoded_ahead(self, model, cache, index, monkeypatch):
        names = opened(monkeypatch)
        encoder = PromptEncoder(model, cache, index)
        assert encoder.encode(iter(PROMPTS), "cpu") == len(PROMPTS)
        assert encoder.encode(PROMPTS, "cpu") == 0
        encoder(PROMPTS)
        assert len(names) == 1

    def test_another_text_encoder_or_prompt_is_encoded_anew(self, model, cache, index, monkeypatch, tmp_path):
        other = random_model(tmp_path / "other", seed=5)
        names = opened(monkeypatch)
        PromptEncoder(model, cache, index)(["a cat"])
        PromptEncoder(other, cache, index)(["a cat"])
        PromptEncoder(other, cache, index)(["a cat", "a dog"])
        PromptEncoder(other, cache, index)(["  a   dog "])  # the same once cleaned
        assert len(names) == 3

    def test_machines_share_encodings_through_a_store(self, model, index, monkeypatch, tmp_path, caplog):
        names = opened(monkeypatch)
        one, other, alone = (tmp_path / name for name in ("one", "other", "alone"))
        expected = PromptEncoder(model, one, index, shared="memory://encodings/prompts")(["a cat", "a dog"])
        assert torch.equal(
            PromptEncoder(model, other, index, shared="memory://encodings/prompts")(["a dog"]), expected[1:]
        )
        assert len(names) == 1, "another machine opens no text encoder"
        # A store that fails costs one warning and the time to encode.
        assert torch.equal(PromptEncoder(model, alone, index, shared="nowhere://x")(["a cat", "a dog"]), expected)
        assert len(names) == 2
        assert [r.message for r in caplog.records if "not shared" in r.message] == [
            "encodings of prompts are not shared in nowhere://x: nowhere:// of nowhere://x/"
            + caplog.records[-1].message.rsplit("/", 1)[1]
        ]

    @pytest.mark.parametrize("damage", [b"", b"no safetensors"])
    def test_a_damaged_entry_is_made_again(self, model, cache, index, damage):
        expected = PromptEncoder(model, cache, index)(["a cat"])
        (entry,) = cache.iterdir()
        entry.write_bytes(damage)
        assert torch.equal(PromptEncoder(model, cache, index)(["a cat"]), expected)
        assert len(entry.read_bytes()) > 100

    @pytest.mark.parametrize("other", ["another prompt", "another shape", "another width", "NaN", "no key"])
    def test_k2_an_entry_of_something_else_is_made_again(self, model, cache, index, other):
        expected = PromptEncoder(model, cache, index)(["a cat"])
        (entry,) = cache.iterdir()
        with safe_open(entry, framework="pt") as file:
            encoding, facts = file.get_tensor("encoding"), file.metadata()
        if other == "another prompt":
            PromptEncoder(model, cache, index)(["a dog"])
            next(path for path in cache.iterdir() if path != entry).replace(entry)
        else:
            changed = {"another shape": encoding[0], "another width": encoding[:, 1:], "NaN": encoding * torch.nan}
            save_file(
                {"encoding": changed.get(other, encoding + 1).contiguous()}, entry, None if other == "no key" else facts
            )
        assert torch.equal(PromptEncoder(model, cache, index)(["a cat"]), expected)

    def test_k5_an_entry_that_cannot_be_removed_costs_time_only(self, model, cache, index):
        expected = PromptEncoder(model, cache, index)(["a cat"])
        (entry,) = cache.iterdir()
        entry.unlink()
        entry.mkdir()  # neither read nor unlinked nor replaced
        assert torch.equal(PromptEncoder(model, cache, index)(["a cat"]), expected)

    def test_a_folder_that_cannot_be_written_costs_time_only(self, model, tmp_path, index, caplog):
        (tmp_path / "file").write_text("not a folder")
        encode = PromptEncoder(model, tmp_path / "file", index)
        assert torch.equal(encode(["a cat"]), PromptEncoder(model, None, index)(["a cat"]))
        assert "is not kept" in caplog.text

    def test_padding_is_not_stored(self, model, cache, index):
        PromptEncoder(model, cache, index)(["a"])
        (entry,) = cache.iterdir()
        assert entry.stat().st_size < 2000

    def test_what_was_not_used_for_longest_gives_way(self, model, cache, index, monkeypatch):
        monkeypatch.setattr(prompts, "LIMIT", 3000)
        encode = PromptEncoder(model, cache, index)
        for age, prompt in enumerate(["aaaa", "bbbb", "cccc", "dddd"]):
            encode([prompt])
            for entry in cache.iterdir():
                if entry.stat().st_mtime > 1e6:
                    os.utime(entry, (age, age))
        assert sum(entry.stat().st_size for entry in cache.iterdir()) <= 3000
        assert 0 not in {entry.stat().st_mtime for entry in cache.iterdir()}

    def test_the_encoder_is_gone_afterwards(self, model, cache, index, monkeypatch):
        made = []
        original = UMT5EncoderModel.__init__

        def remember(self, *args, **kwargs):
            original(self, *args, **kwargs)
            made.append(weakref.ref(self))

        monkeypatch.setattr(UMT5EncoderModel, "__init__", remember)
        PromptEncoder(model, cache, index)(["a"])
        assert [encoder() for encoder in made] == [None]


@pytest.mark.parametrize("damage", ["renamed", "missing", "empty"])
def test_k2_a_text_encoder_without_the_weights_of_its_file_is_refused(damage, model, tmp_path):
    """transformers would draw them at random, and prompts mean nothing."""
    shutil.copytree(model, tmp_path / "m")
    (file,) = (tmp_path / "m" / "text_encoder").glob("*.safetensors")
    state = load_file(file)
    name = next(name for name in state if name.endswith("SelfAttention.q.weight"))
    weight = state.pop(name)
    if damage == "renamed":
        state[f"network.{name}"] = weight
    elif damage == "empty":
        state[name] = torch.zeros_like(weight)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(EmtError, match=rf"text_encoder of the model (.|\n)*{re.escape(name)}"):
        PromptEncoder(tmp_path / "m", None, ContentIndex(tmp_path / "index"))(["a"])


def test_a_model_without_a_text_encoder(tmp_path):
    with pytest.raises(EmtError, match="text_encoder"):
        PromptEncoder(tmp_path, None, ContentIndex(tmp_path / "index"))(["a"])
