"""Textual inversion: the files that people have, and prompts with their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.normalizers import Lowercase
from torch import Tensor

from emt import EmtError
from emt.backbones.sd15.random_model import random_model
from emt.backbones.sd15.textual_inversion import add_embeddings, read_embedding
from emt.hub import split_word
from emt.pipeline import MotionTransferPipeline, load_pipeline

WIDTH = 32


def vectors(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def write(kind: str, folder: Path) -> Path:
    path = folder / ("e.safetensors" if "safetensors" in kind else "e.pt")
    web = {"string_to_token": {"*": 265}, "name": "style", "step": 99, "sd_checkpoint": "abc"}
    contents: dict[str, Any] = {
        "web UI": {**web, "string_to_param": {"*": vectors()}},
        "web UI, parameters": {**web, "string_to_param": {"*": torch.nn.Parameter(vectors())}},
        "the paper's": {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors())}),
        },
        "diffusers": {"<style>": vectors()},
        "web UI, safetensors": {"emb_params": vectors()},
        "diffusers, safetensors": {"<style>": vectors()},
        "one text encoder's, safetensors": {"clip_l": vectors()},
    }
    save_file(contents[kind], path) if path.suffix == ".safetensors" else torch.save(contents[kind], path)
    return path


KINDS = [
    "web UI",
    "web UI, parameters",
    "the paper's",
    "diffusers",
    "web UI, safetensors",
    "diffusers, safetensors",
    "one text encoder's, safetensors",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_embedding(kind: str, tmp_path: Path) -> None:
    assert torch.equal(read_embedding(write(kind, tmp_path), WIDTH), vectors())


def test_an_embedding_of_one_vector(tmp_path: Path) -> None:
    torch.save({"<style>": vectors(1)[0]}, tmp_path / "learned_embeds.bin")
    assert torch.equal(read_embedding(tmp_path / "learned_embeds.bin", WIDTH), vectors(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<a>": torch.ones(2, 1024)}, "has width 1024, as Stable Diffusion 2 has; the text encoder has 32"),
        ({"<a>": torch.ones(2, 7)}, "has width 7; the text encoder has 32"),
        ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 64)}, "is of Stable Diffusion XL"),
        ({"<a>": torch.ones(2, 32), "<b>": torch.ones(2, 32)}, "holds 2 words: <a>, <b>"),
        ({"<a>": torch.full((2, 32), float("nan"))}, "some that are not finite"),
        ({"<a>": torch.ones(0, 32)}, "has no vectors"),
        ({"<a>": torch.tensor(1.0)}, "has width 1"),
        ({"down_blocks.0.x.weight": torch.ones(2, 2, 2)}, "is a UNet in diffusers layout, not a textual inversion"),
    ],
)
def test_what_is_no_embedding_of_the_model_is_reported(content: Any, message: str, tmp_path: Path) -> None:
    save_file(content, tmp_path / "e.safetensors")
    with pytest.raises(EmtError, match=message):
        read_embedding(tmp_path / "e.safetensors", WIDTH)


def test_k7_an_embedding_that_diverged_is_named(tmp_path: Path) -> None:
    save_file({"word": vectors(1) * 1e30}, tmp_path / "e.safetensors")
    with pytest.raises(EmtError, match=r"has values up to .*e\+30"):
        read_embedding(tmp_path / "e.safetensors", WIDTH)


def test_a_word_and_a_file() -> None:
    assert split_word("easynegative=a/b=c.pt") == ("easynegative", "a/b=c.pt")
    for bad in ("x", "=x", "a b=x", "x=", ""):
        with pytest.raises(EmtError, match="not a word and a file"):
            split_word(bad)


@pytest.fixture
def pipe(tmp_path: Path) -> MotionTransferPipeline:
    return load_pipeline(random_model(tmp_path / "m", frames=4, height=32, width=32))


@pytest.mark.parametrize("text", ["a EasyNegative fox", "a easynegative fox", "(easynegative)", "bad, EASYNEGATIVE"])
def test_k2_a_tokenizer_of_small_letters_reads_all_vectors(pipe: MotionTransferPipeline, text: str) -> None:
    """CLIP's tokenizer writes all in small letters, so that a word's token is another text than its name."""
    pipe.tokenizer.backend_tokenizer.normalizer = Lowercase()
    add_embeddings(pipe, {"EasyNegative": vectors(3)})
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(text, pipe.tokenizer)).input_ids
    assert [i - len(pipe.tokenizer) + 3 for i in ids if i >= len(pipe.tokenizer) - 3] == [0, 1, 2]


def test_k2_a_word_is_not_found_within_others(pipe: MotionTransferPipeline) -> None:
    add_embeddings(pipe, {"style": vectors(2), "<b>": vectors(1, seed=1)})
    for text, new in (("a mystyles fox", 0), ("a style, fox", 2), ("fox<b>fox", 1)):
        ids = pipe.tokenizer(pipe.maybe_convert_prompt(text, pipe.tokenizer)).input_ids
        assert sum(i >= len(pipe.tokenizer) - 3 for i in ids) == new, text


@torch.no_grad()
def test_a_word_stands_for_all_of_its_vectors(pipe: MotionTransferPipeline) -> None:
    before = pipe.encode_prompts(["a fox"])
    add_embeddings(pipe, {"style": vectors(3), "other": vectors(1, seed=1)})
    assert torch.equal(pipe.encode_prompts(["a fox"]), before)  # other prompts are as they were
    table = pipe.text_encoder.get_input_embeddings().weight
    for text, expected in (("a style fox", vectors(3)), ("other", vectors(1, seed=1))):
        ids = pipe.tokenizer(pipe.maybe_convert_prompt(text, pipe.tokenizer)).input_ids
        inserted = [table[i] for i in ids if i >= len(pipe.tokenizer) - 4]
        assert torch.equal(torch.stack(inserted), expected)
    assert not torch.equal(pipe.encode_prompts(["a style fox"]), pipe.encode_prompts(["a fox"]))
    with pytest.raises(EmtError, match="the model has a word 'style'"):
        add_embeddings(pipe, {"style": vectors(2)})
