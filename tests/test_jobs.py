"""Jobs: which there are, what they are called, and what makes two of them the same."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from enum import Enum
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emt.errors import EmtError
from emt_cli.batch import jobs
from emt_cli.batch.jobs import Job, identify, slug
from emt_cli.batch.options import (
    SETTING_NAMES,
    Format,
    Scheduler,
    Settings,
    parse_batch_size,
    parse_field,
    parse_seeds,
)
from emt_cli.text import printable

PROMPTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400)
JOB = Job(Path("/clips/dance.mp4"), "a red star", 0, Settings())


def output_name(job: Job, reference: str) -> PurePosixPath:
    return PurePosixPath(jobs.output_name(job, reference))


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red star", "a-red-star-0.mp4"),
        ("ein löwe", "ein-löwe-0.mp4"),
        ("一只狗", "一只狗-0.mp4"),
        ("हिन्दी", "हिन्दी-0.mp4"),
    ],
)
def test_a_plain_prompt_is_its_own_name_in_any_language(prompt, name):
    assert output_name(replace(JOB, prompt=prompt), "ab" * 32).name == name


@pytest.mark.parametrize("prompt", ["A red star", "a  red star", "a-red-star", "a red star!", "../../etc/passwd", "…"])
def test_a_prompt_that_its_slug_does_not_spell_gets_a_hash(prompt):
    assert "_" in output_name(replace(JOB, prompt=prompt), "ab" * 32).name


@given(PROMPTS, PROMPTS, st.integers(0, 2**63 - 1), st.sampled_from(Format))
@example("a red star", "a-red-star", 0, Format.MP4)
@example("x 1", "x", 1, Format.MP4)
@example("a" * 400, "a" * 399, 0, Format.PNG)
def test_different_prompts_never_share_a_name(one, other, seed, format):
    settings = Settings(format=format)
    names = [str(output_name(Job(JOB.reference, p, seed, settings), "ab" * 32)).casefold() for p in (one, other)]
    assert (names[0] == names[1]) == (one == other)


@given(PROMPTS, st.text(min_size=1).filter(lambda s: "/" not in s and "\0" not in s), st.integers(0, 2**63 - 1))
def test_names_are_safe_on_every_file_system(prompt, stem, seed):
    output = output_name(Job(Path(f"/clips/{stem}.mp4"), prompt, seed, Settings(), overrides=("steps",)), "ab" * 32)
    assert len(output.parts) == 2
    for part in output.parts:
        assert len((part + ".json").encode()) <= 255
        assert not part.startswith((".", "-", "~", " "))
        assert not set(part) & set('<>:"/\\|?*\0')
        assert part.split(".")[0].upper() not in ("CON", "PRN", "AUX", "NUL")


@pytest.mark.parametrize(
    ("reading", "long"),
    [((), False), (("webui", 1, False), False), (("webui", 2, False), True), (("webui", 1, True), True)],
)
def test_a_text_is_long_if_it_has_several_chunks_or_changes_over_the_clip(reading, long):
    """Engines are built for the encoding of one text of the text encoder's length, with weights or without."""
    assert replace(JOB, reading=reading).has_long_text == long


def test_references_of_one_name_in_two_folders_stay_apart():
    here, there = (output_name(replace(JOB, reference=Path(f"/{f}/x.mp4")), 64 * f) for f in "ab")
    assert here.name == there.name
    assert here.parent != there.parent


def test_settings_of_a_jobs_own_line_are_part_of_its_name_and_those_of_the_run_are_not():
    quick = replace(JOB, settings=Settings(steps=5))
    assert output_name(quick, "a" * 64) == output_name(JOB, "a" * 64)
    assert output_name(replace(quick, overrides=("steps",)), "a" * 64) != output_name(JOB, "a" * 64)


@pytest.mark.parametrize("format", Format)
def test_k3_a_job_made_otherwise_has_a_name_beside_the_plain_one(format):
    plain = jobs.output_name(replace(JOB, settings=Settings(format=format)), "a" * 64)
    own = jobs.own_name(plain, "0123456789abcdef")
    assert PurePosixPath(own).suffix == PurePosixPath(plain).suffix
    assert PurePosixPath(own).stem == f"{PurePosixPath(plain).stem}_0123456789"


def test_slugs_are_cut_between_words():
    assert slug("word " * 50, 80) == "-".join(["word"] * 16)
    assert len(slug("x" * 200)) == 80


# ---- identity -----------------------------------------------------------------------------------------------------


def test_a_jobs_identity_changes_with_everything_that_changes_its_frames():
    def identity(job=JOB, reference="r", model="m", precision="auto"):
        return identify(job, reference=reference, model=model, precision=precision)

    changes = {
        "frames": 8, "height": 64, "width": 64, "steps": 3, "guidance": 2.0, "scheduler": Scheduler.LCM,
        "negative_prompt": "x", "fit": "pad", "start": 1.0, "duration": 2.0, "stride": 2, "fps": 3.0, "format": "gif",
        "best_of": 3, "guidance_until": 0.5, "cache_interval": 2, "audio": "copy",
        "lora": ("/x:1.0",), "vae": "/x", "embedding": ("x=/x",), "clip_skip": 2, "method": "guidance",
        "control": "/x:1.0", "control_image": ("/x.png@0",),
    }  # fmt: skip
    # These are what they set, and how a prompt is read matters where it has syntax (tests/test_prompt_syntax.py).
    assert set(changes) | {"preset", "size", "prompt_syntax"} == set(SETTING_NAMES)
    others = [replace(JOB, settings=replace(JOB.settings, **{k: parse_field(k, v)})) for k, v in changes.items()]
    others += [replace(JOB, prompt="b"), replace(JOB, seed=1)]
    identities = {identity(), identity(reference="q"), identity(model="n"), identity(precision="fp32")}
    identities |= {identity(job) for job in others}
    assert len(identities) == 4 + len(others)

    moved = replace(JOB, reference=Path("/elsewhere/other name.mp4"), origin="line 3", overrides=("steps",))
    assert identity(moved) == identity(), "where a file lies and where a job was read is no part of it"


def test_seeds_beyond_32_bits_are_other_jobs_than_those_of_version_0_1(monkeypatch):
    monkeypatch.setattr(jobs, "digest", lambda *values: values)  # that version read the last 32 bits of a seed
    known = {s: identify(replace(JOB, seed=s), reference="r", model="m", precision="auto") for s in (2**32 - 1, 2**32)}
    assert ["seed of 64 bits" in values for values in known.values()] == [False, True]


def test_jobs_without_the_later_settings_are_those_of_earlier_versions():
    settings = Settings().as_dict()
    assert "audio" not in settings
    assert identify(JOB, reference="r", model="m", precision="auto") == "67a299af6d796929e0b581335c199a2a"


# ---- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [("steps", "25", 25), ("steps", 25.0, 25), ("guidance", "1", 1.0), ("scheduler", "dpm++", Scheduler.DPM),
     ("duration", None, None), ("seed", 2**63 - 1, 2**63 - 1), ("negative_prompt", "", ""),
     ("prompt", {"0": "a fox", "8": "a wolf"}, '{"0": "a fox", "8": "a wolf"}')],
)  # fmt: skip
def test_values_of_job_files(name, value, parsed):
    assert parse_field(name, value) == parsed


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("steps", 0, "from 1 to 500"), ("steps", 2.5, "whole"), ("steps", True, "whole"), ("steps", None, "whole"),
        ("width", 100, "96 or 104"), ("guidance", float("nan"), "from 1 to 50"), ("guidance", "nan", "from 1 to 50"),
        ("scheduler", "magic", "ddim, dpm++"), ("seed", -1, "from 0"), ("seed", 2**63, "to 9223372036854775807"),
        ("prompt", "  ", "Say"), ("prompt", "a\x1b[31m", "Remove"), ("prompt", "\ud800", "UTF-8"),
        ("prompt", 5, "text"), ("prompt", "word " * 10_000, "4,000"), ("hue", "red", "reference, prompt, seed"),
        ("frames", 1e400, "whole"), ("prompt", {"0": "a fox", "8": 5}, '{"0": "a fox"'), ("prompt", {}, "by frames"),
        ("negative_prompt", {"a": "fox"}, "by frames"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_reported_with_what_is_allowed(name, value, hint):
    with pytest.raises(EmtError) as caught:
        parse_field(name, value)
    assert hint in caught.value.hint


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(st.sampled_from(("seed", "prompt", "reference", *SETTING_NAMES, "x")), JSON_VALUES)
def test_any_json_value_is_refused_or_taken_as_it_is(name, value):
    try:
        parsed = parse_field(name, value)
    except EmtError:
        return
    assert name != "x"
    taken = parsed.value if isinstance(parsed, Enum) else parsed
    if name in ("lora", "vae", "embedding", "control", "control_image"):  # which make paths absolute
        value = taken
        taken = parse_field(name, list(taken) if isinstance(taken, tuple) else taken)
    assert taken == value or (isinstance(value, str) and float(value) == taken)
    assert not isinstance(value, bool)
    if name in SETTING_NAMES:
        json.dumps(replace(Settings(), **{name: parsed}).as_dict(), allow_nan=False)


def test_seeds_and_batch_sizes():
    assert parse_seeds("3, 1,0-2") == [3, 1, 0, 2]
    assert [parse_batch_size(text) for text in ("auto", "1", "64")] == [None, 1, 64]
    for wrong in ("", "x", "2-1", "1-", "0-9999999999", "²", "9" * 5000, f"random:{'9' * 5000}", "random:0"):
        with pytest.raises(EmtError):
            parse_seeds(wrong)
    with pytest.raises(EmtError):
        parse_batch_size("65")


def test_control_characters_are_shown_not_obeyed():
    assert printable("a\x1b[31m\n\u202e\udc80é") == "a\\x1b[31m\\n\\u202e\\udc80é"
    assert io.StringIO().write(printable("\ud800")) == 6
