"""Prompts with weights, breaks, chunks and key frames: what is read, what is encoded, and what a run makes of them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from program import FRAMES, clip, emt, environment, lines, model, transfer

from emt import demo
from emt.errors import EmtError
from emt.features import TextFeatures
from emt.model_folder import Model, find_model
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.prompt_syntax import Piece, chunks_of, is_simple, parse, parse_schedule, shares, words_of
from emt.text_encoding import weighted
from emt.video import read_clip
from emt.windowed import text_of
from emt_cli.batch.inputs import unread_syntax
from emt_cli.commands.evaluate import _from_results

LIMIT = 77
SETTINGS = {"negative_prompt": "", "frames": FRAMES, "height": 32, "width": 32, "steps": 2, "scheduler": "ddim"}


def pairs(prompt: str) -> list[tuple[str, float]]:
    return [("BREAK " * piece.breaks + piece.text, round(piece.weight, 4)) for piece in parse(prompt)]


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("", [("", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("unbalanced) [", [("unbalanced) ", 1)]),
        (r"\(literal\] \\ \x", [(r"(literal] \ x", 1)]),
        ("(two)(at once)", [("twoat once", 1.1)]),
        ("a (b:1.3)", [("a ", 1), ("b", 1.3)]),
        ("a (b : 0.5 ) c", [("a ", 1), ("b ", 0.5), (" c", 1)]),
        ("a (b:-1)", [("a ", 1), ("b", -1)]),
        ("16:9) at 4:3", [("16:9) at 4:3", 1)]),
        ("[less]", [("less", round(1 / 1.1, 4))]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("one BREAK two", [("one", 1), ("BREAK two", 1)]),
        ("(one BREAK two:1.2)", [("one", 1.2), ("BREAK", -1.2), ("two", 1.2)]),  # which it weighs, and knows no more
        ("(one BREAK two:1)", [("one", 1), ("BREAK two", 1)]),
        ("([one BREAK two])", [("one", 1), ("BREAK two", 1)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
    ],
)
def test_weights_and_breaks_are_read_as_the_web_ui_reads_them(prompt, expected):
    assert pairs(prompt) == expected


@given(st.text(alphabet="ab ()[]:\\.12 BREAK", max_size=30))
def test_any_prompt_is_read_and_one_without_syntax_is_itself(prompt):
    try:
        found = parse(prompt)
    except EmtError:  # a weight of thousands
        return
    assert found
    assert all(np.isfinite(piece.weight) for piece in found)
    if not re.search(r"[()\[\]\\]|BREAK", prompt):
        assert is_simple(prompt)
        assert found == [Piece(prompt)]


def test_a_weight_without_sense_is_an_error():
    with pytest.raises(EmtError, match="has the weight 5000"):
        parse("a (b:5000)")


def cut(prompt: str, size: int) -> list[str]:
    """Chunks of a tokenizer that reads letters, a comma among them."""
    chunks = chunks_of(parse(prompt), lambda text: [ord(x) for x in text], size, ord(","))
    return ["".join(map(chr, chunk.ids)) for chunk in chunks]


def test_what_is_longer_than_a_text_is_cut_after_a_near_comma():
    assert cut("abcdefgh", 4) == ["abcd", "efgh"]
    assert cut("ab,cdefg", 4) == ["ab,", "cdef", "g"]
    assert cut("abcd,efg", 4) == ["abcd", ",efg"]
    assert cut("a,b,BREAKFAST", 9) == ["a,b,", "BREAKFAST"]
    assert cut("a, BREAK b", 9) == ["a,", "b"]
    assert cut("a BREAK", 9) == ["a"]
    assert cut("," + "x" * 40, 30) == ["," + "x" * 29, "x" * 11], "a comma more than 20 tokens before"
    assert cut("", 4) == [""]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("0: a fox | 8: a wolf", {0: "a fox", 8: "a wolf"}),
        ("8:b|0: a", {0: "a", 8: "b"}),
        ('{"0": "a fox", "8": "a (wolf:1.2) | x"}', {0: "a fox", 8: "a (wolf:1.2) | x"}),
        ('"0": "a fox", "8": "a wolf",', {0: "a fox", 8: "a wolf"}),
        ("2001: a space odyssey", None),
        ("2001: a space odyssey | 4k", None),
        ("a | b", None),
        ('"quoted" words', None),
        ('{"a": "b"}', None),
        ("{red|blue} ball", None),
    ],
)
def test_key_frames(prompt, expected):
    assert parse_schedule(prompt) == expected


def test_key_frames_that_make_no_sense():
    for prompt, message in (("0: a | 0: b", "has frame 0 twice"), ("0: a | 8:", "has nothing for frame 8")):
        with pytest.raises(EmtError, match=message):
            parse_schedule(prompt)


def test_between_key_frames_the_share_of_the_later_one_rises_evenly():
    assert shares({1: "a", 5: "b"}, 7) == [
        (1, 1, 0.0),
        (1, 1, 0.0),
        (1, 5, 0.25),
        (1, 5, 0.5),
        (1, 5, 0.75),
        (5, 5, 0.0),
        (5, 5, 0.0),
    ]


# ---- encoding ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> MotionTransferPipeline:
    return load_pipeline(model())


@pytest.fixture
def webui(pipe):
    pipe.prompt_syntax = "webui"
    yield pipe
    pipe.prompt_syntax = "plain"


def plain(pipe: MotionTransferPipeline, *prompts: str) -> torch.Tensor:
    before, pipe.prompt_syntax = pipe.prompt_syntax, "plain"
    try:
        with torch.no_grad():
            return torch.cat([pipe.encode_prompts([prompt]) for prompt in prompts])
    finally:
        pipe.prompt_syntax = before


@torch.no_grad()
def test_a_prompt_without_syntax_has_the_same_bits(webui):
    assert torch.equal(webui.encode_prompts(["a red fox, 16:9"]), plain(webui, "a red fox, 16:9"))


@torch.no_grad()
def test_a_weighted_word_is_its_encoding_times_the_weight_with_the_mean_restored(webui):
    """The web UI's original emphasis, from its definition."""
    prompt = "a (fox:1.5) on [ice]"
    ids = [webui.tokenizer(text, add_special_tokens=False).input_ids for text in ("a ", "fox", " on ", "ice")]
    row = [x for part in ids for x in part]
    weights = [1.0] + [w for part, w in zip(ids, (1, 1.5, 1, 1 / 1.1)) for _ in part]
    weights += [1.0] * (LIMIT - len(weights))
    tokens = [webui.tokenizer.bos_token_id, *row, *[webui.tokenizer.eos_token_id] * (LIMIT - 1 - len(row))]
    z = webui.text_encoder(torch.tensor([tokens]))[0]
    expected = z * torch.tensor(weights)[:, None]
    expected *= z.mean() / expected.mean()
    torch.testing.assert_close(webui.encode_prompts([prompt]), expected)
    assert (webui.encode_prompts([prompt]) - plain(webui, "a fox on ice")).abs().max() > 0.01
    assert torch.equal(webui.encode_prompts([r"a \(fox\)"]), webui.encode_prompts([r"a \(fox\)", "x"])[:1])


def test_weights_of_one_leave_every_bit():
    x = torch.randn(2, 3, 4, dtype=torch.float16)
    assert torch.equal(weighted(x, torch.ones(2, 3)), x)
    zero = weighted(x, torch.zeros(2, 3))
    assert torch.isfinite(zero).all()


@torch.no_grad()
def test_a_long_prompt_is_the_encodings_of_its_chunks_one_after_another(webui):
    """As diffusers' long-prompt pipeline and the web UI put them together; the shorter prompt has empty ones."""
    words = [f"w{i:02}" for i in range(40)]
    ids = [webui.tokenizer(word, add_special_tokens=False).input_ids for word in words]
    flat = [x for part in webui.tokenizer([" ".join(words)], add_special_tokens=False).input_ids for x in part]
    assert len(flat) > LIMIT - 2
    assert flat == [x for part in ids for x in part]
    found = webui.encode_prompts([" ".join(words), "short"])
    bos, eos = webui.tokenizer.bos_token_id, webui.tokenizer.eos_token_id
    expected = []
    for start in range(0, len(flat), LIMIT - 2):
        part = flat[start : start + LIMIT - 2]
        expected.append(webui.text_encoder(torch.tensor([[bos, *part, *[eos] * (LIMIT - 1 - len(part))]]))[0])
    assert found.shape == (2, len(expected) * LIMIT, 32)
    torch.testing.assert_close(found[:1], torch.cat(expected, 1))
    empty = [plain(webui, "")] * (len(expected) - 1)
    torch.testing.assert_close(found[1:], torch.cat([plain(webui, "short"), *empty], 1))
    torch.testing.assert_close(
        webui.encode_prompts(["a fox BREAK on ice"]), torch.cat([plain(webui, "a fox"), plain(webui, "on ice")], 1)
    )


@torch.no_grad()
def test_the_encodings_of_frames_lie_between_those_of_the_key_frames(webui):
    found = webui.encode_prompts(["", "0: a fox | 2: a wolf"], FRAMES)
    fox, wolf = plain(webui, "a fox", "a wolf")
    assert found.shape == (2 * FRAMES, LIMIT, 32)
    expected = torch.stack([fox, (fox + wolf) / 2, wolf, wolf])
    torch.testing.assert_close(found[FRAMES:], expected)
    torch.testing.assert_close(found[:FRAMES], plain(webui, "").expand(FRAMES, -1, -1))
    with pytest.raises(EmtError, match="changes over the clip"):
        webui.encode_prompts(["0: a | 2: b"])


@torch.no_grad()
def test_the_network_reads_the_encoding_of_each_frame(webui):
    """With one prompt at all key frames the clip is that of the prompt; with others only attention over time mixes."""
    unet = webui.unet
    sample = torch.randn(2, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(0))
    text = plain(webui, "a fox", "a wolf")
    each = text.repeat_interleave(FRAMES, 0)
    torch.testing.assert_close(unet(sample, 500, each), unet(sample, 500, text))
    changed = each.clone()
    changed[-1] = text[0]
    found, before = unet(sample, 500, changed), unet(sample, 500, each)
    assert torch.equal(found[0], before[0])
    assert not torch.equal(found[1], before[1])
    with pytest.raises(ValueError, match="text has batch 3"):
        unet(sample, 500, torch.cat([text, text[:1]]))


def test_a_window_of_a_long_clip_has_the_encodings_of_its_frames():
    each = torch.arange(2 * 6.0)[:, None, None]
    text, sample = TextFeatures({"x": (each, -each)}), torch.zeros(2, 4, 6, 1, 1)
    key, value = text_of(text, sample, slice(2, 5)).layers["x"]
    assert key.flatten().tolist() == [2, 3, 4, 8, 9, 10]
    assert torch.equal(value, -key)
    whole = TextFeatures({"x": (each[:2], each[:2])})
    assert text_of(whole, sample, slice(2, 5)) is whole


# ---- how a clip's prompts are read ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Model:
    return find_model(str(model()), download=False)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a fox", ()),
        ("a (fox)", ("webui", 1, False)),
        ("a fox BREAK ice", ("webui", 2, False)),
        ("0: a | 2: b", ("webui", 1, True)),
        ("w " * 75, ()),
        ("w " * 76, ("webui", 2, False)),
    ],
)
def test_how_a_prompt_is_read_is_known_without_the_text_encoder(found, pipe, prompt, expected):
    assert found.reading(prompt, SETTINGS) == expected
    assert found.reading("", SETTINGS | {"negative_prompt": prompt}) == expected
    assert found.reading(prompt, SETTINGS | {"prompt_syntax": "plain"}) == ()
    if expected:
        pipe.prompt_syntax = "webui"
        assert pipe.encode_prompts([prompt], FRAMES).shape[1] == LIMIT * expected[1]
        pipe.prompt_syntax = "plain"


def test_a_key_frame_beyond_the_clip_and_words_that_a_model_does_not_know(found):
    with pytest.raises(EmtError, match=f"the prompt has frame {FRAMES}"):
        found.check(f"0: a | {FRAMES}: b", SETTINGS)
    small = find_model(demo.NAME, download=False)
    settings = SETTINGS | {"frames": 16, "height": 128, "width": 128}
    small.check("a (yellow:1.3) penguin BREAK in the [desert]", settings)
    small.check("0: a penguin | 8: a whale", settings)
    with pytest.raises(EmtError, match="does not know: zebra"):
        small.check("0: a penguin | 8: a (zebra:1.2)", settings)
    with pytest.raises(EmtError, match="does not know"):
        small.check("a (yellow:1.3) penguin", settings | {"prompt_syntax": "plain"})
    assert words_of("0: a (red) | 8: b") == "a  red b"


def test_runs_read_weights_and_key_frames_and_rerun_them(tmp_path):
    clip(tmp_path / "a.mp4", 1)
    prompts = ["a (fox:1.4)", "a fox", "0: a fox | 3: a wolf", "a <lora:x:1> fox BREAK " + "w " * 80]
    job = ["a.mp4", *(word for prompt in prompts for word in ("--prompt", prompt)), "--json"]
    ended = transfer(tmp_path, *job)
    made = {line["prompt"]: line for line in lines(ended)}
    assert {line["state"] for line in made.values()} == {"done"}, ended.err
    assert ended.err.count("read as plain text") == 1
    assert "<lora:x:1>" in ended.err
    assert "(fox" not in ended.err.split("read as plain text")[1].splitlines()[0]
    assert {line["state"] for line in lines(transfer(tmp_path, *job))} == {"skipped"}
    plainly = {line["prompt"]: line for line in lines(transfer(tmp_path, *job, "--prompt-syntax", "plain"))}
    assert {prompt for prompt in prompts if plainly[prompt]["state"] == "skipped"} == {"a fox"}, "no other has changed"
    frames = {p: read_clip(tmp_path / line["path"], frames=FRAMES).frames for p, line in made.items()}
    by_letter = read_clip(tmp_path / plainly[prompts[0]]["path"], frames=FRAMES).frames
    assert (frames[prompts[0]] != by_letter).any()
    assert len({x.tobytes() for x in frames.values()}) == len(prompts)

    pairs = [pair.prompt for pair in _from_results(tmp_path / "out", None)]
    assert "a fox a wolf" in pairs, "measures of a clip against its prompt read its words"
    ended = emt(
        "rerun", made[prompts[2]]["path"], "--device", "cpu", folder=tmp_path, environment=environment(tmp_path)
    )
    assert "identical with the original" in ended.err, ended.err
    # A record of a version that read prompts by the letter alone.
    path = tmp_path / (plainly[prompts[0]]["path"] + ".json")
    record = json.loads(path.read_bytes())
    del record["settings"]["prompt_syntax"]
    path.write_text(json.dumps(record))
    ended = emt("rerun", str(path), "--device", "cpu", folder=tmp_path, environment=environment(tmp_path))
    assert "identical with the original" in ended.err, ended.err


@pytest.mark.parametrize(
    "prompt",
    [
        '{"0": "a fox", "8": "a wolf"',
        '{"0": "a fox", "8": 5}',
        '"0": "a fox" "8": "a wolf"',
        "0: a fox | a wolf",
        "a fox | 8: a wolf",
        "0: a fox",
    ],
)
def test_a_prompt_that_is_nearly_one_by_key_frames_is_said_to_be_text(prompt):
    assert [kind for kind, _ in unread_syntax(prompt, read=True)] == ["key frames"]


def test_key_frames_are_said_to_be_text_only_where_they_are_not_read():
    for prompt in ("0: a fox | 8: a wolf", '{"0": "a fox", "8": "a wolf"}'):
        assert not list(unread_syntax(prompt, read=True))
        assert [kind for kind, _ in unread_syntax(prompt)] == ["key frames"], "by the letter"
    assert not list(unread_syntax("0: a fox | 0: a wolf", read=True)), "an error of its own, later"


def test_a_break_within_brackets_is_said_to_be_the_word():
    assert list(unread_syntax("a (fox BREAK ice:1.2)", read=True)) == [("break", "BREAK in brackets")]
    assert not list(unread_syntax("a (fox:1.2) BREAK ice", read=True))
    assert not list(unread_syntax("a (fox BREAK ice:1)", read=True))
    assert not list(unread_syntax("a (b:5000) BREAK", read=True)), "an error of its own, later"
