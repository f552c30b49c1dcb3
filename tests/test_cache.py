"""The cache: hashes that follow the content, motions of exactly their key, and a run that goes on when it fails."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from program import clip, environment, lines, model, transfer

from emt import cache
from emt.cache import ContentIndex, MotionCache, default_dir
from emt.device import Device
from emt.features import Motion, MotionFeatures
from emt.model_folder import find_model
from emt_cli.batch.generator import Generator
from emt_cli.batch.jobs import Job
from emt_cli.batch.options import Fit, Scheduler, Settings

DEEP = b"[" * 100_000 + b"]" * 100_000

# ---- content hashes -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_settling(monkeypatch):
    monkeypatch.setattr(cache, "_SETTLED_NS", 0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    return path


def test_a_hash_follows_the_content_even_if_size_and_time_are_the_same(tmp_path, file, no_settling):
    index = ContentIndex(tmp_path / "cache")
    first, times = index.sha256(file), file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert index.sha256(file) != first
    file.write_bytes(b"one")
    assert index.sha256(file) == first


def test_a_known_file_is_not_read_again_not_even_by_the_next_process(tmp_path, file, no_settling, monkeypatch):
    first = ContentIndex(tmp_path / "cache").sha256(file)
    monkeypatch.setattr(cache, "sha256_of", lambda path: pytest.fail("read again"))
    assert ContentIndex(tmp_path / "cache").sha256(file) == first


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(b"%d" % number)
    return folder


def test_a_folder_of_images_is_its_names_and_contents(tmp_path, images, no_settling):
    index = ContentIndex(tmp_path / "cache")
    first = index.sha256(images)
    (images / "1.png").rename(images / "one.png")
    renamed = index.sha256(images)
    times = (images / "2.png").stat()
    (images / "2.png").write_bytes(b"x")
    os.utime(images / "2.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len({first, renamed, index.sha256(images)}) == 3


def test_k8_the_images_of_a_known_folder_are_not_looked_up_one_by_one(tmp_path, images, no_settling, monkeypatch):
    first = ContentIndex(tmp_path / "cache").sha256(images)
    monkeypatch.setattr(ContentIndex, "remember", lambda *arguments: pytest.fail("looked up"))
    assert ContentIndex(tmp_path / "cache").sha256(images) == first


# ---- an index that fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"not a database, but long enough to be taken for one" * 100, b""])
def test_a_damaged_index_is_made_again(tmp_path, file, content):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index.sqlite").write_bytes(content)
    assert ContentIndex(tmp_path / "cache").sha256(file) == cache.sha256_of(file)


@pytest.mark.parametrize("value", [DEEP.decode(), "[", "7", "null", "", '["a"]', b"\xff\x00"])
def test_k5_a_damaged_value_is_found_again(tmp_path, file, no_settling, value):
    ContentIndex(tmp_path / "cache").sha256(file)
    with sqlite3.connect(tmp_path / "cache" / "index.sqlite") as database:
        assert database.execute("UPDATE facts SET value = ?", (value,)).rowcount == 1
    assert ContentIndex(tmp_path / "cache").sha256(file) == cache.sha256_of(file)
    assert ContentIndex(tmp_path / "cache").sha256(file) == cache.sha256_of(file)


def spoil(folder: Path, how: str) -> Path:
    """A cache folder that cannot be used."""
    if how == "a file":
        folder.write_bytes(b"")
    elif how == "inside a file":
        folder.write_bytes(b"")
        folder = folder / "cache"
    elif how == "a folder where the database should be":
        (folder / "index.sqlite").mkdir(parents=True)
    elif how == "another table":
        folder.mkdir()
        with sqlite3.connect(folder / "index.sqlite") as database:
            database.execute("CREATE TABLE facts (other TEXT)")
    else:
        folder = Path("/proc/self/nothing")
    return folder


@pytest.mark.parametrize(
    "how",
    ["a file", "inside a file", "a folder where the database should be", "another table", "where nobody may write"],
)
def test_k5_an_index_that_cannot_be_used_costs_one_line(tmp_path, file, no_settling, how):
    said: list[str] = []
    index = ContentIndex(spoil(tmp_path / "cache", how), said.append)
    for _ in range(3):
        assert index.sha256(file) == cache.sha256_of(file)
    assert len(said) == 1, said
    assert "hashes of files are not kept" in said[0]


def test_k5_no_home_is_no_error(tmp_path, file, monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert ContentIndex(default_dir()).sha256(file) == cache.sha256_of(file)
    assert MotionCache(default_dir() / "motion", 1e9).load("a", SHAPE) is None


# ---- motion features ----------------------------------------------------------------------------------------------

SHAPE = 4, 32, 32  # frames, height, width


def motion(value: float) -> Motion:
    layers = {"layer": (torch.full((1, 4, 8, 8), value), torch.full((1, 4, 8, 8), -value))}
    return Motion(MotionFeatures(layers), *SHAPE, seed=0)


def value_of(loaded: tuple[Motion, float] | None) -> float | None:
    return None if loaded is None else float(loaded[0].features.layers["layer"][0].max())


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_dir() == tmp_path / "x" / "emt"
    for unset in ("", None):
        monkeypatch.setenv("XDG_CACHE_HOME", "") if unset == "" else monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_dir() == tmp_path / ".cache" / "emt"


def test_motion_is_kept(tmp_path):
    kept = MotionCache(tmp_path, 1e6)
    assert kept.load("a", SHAPE) is None
    kept.save("b", motion(2.0), 0.25)
    assert kept.load("b", SHAPE)[1] == 0.25, "a frame every four seconds"
    kept.save("a", motion(3.0), 7.5)
    loaded, fps = MotionCache(tmp_path, 1e6).load("a", SHAPE)
    assert fps == 7.5
    assert torch.equal(loaded.features.layers["layer"][0], motion(3.0).features.layers["layer"][0])


@pytest.mark.parametrize("where", [0.1, 0.5, 0.99])
def test_a_damaged_motion_is_dropped(tmp_path, where):
    kept = MotionCache(tmp_path, 1e6)
    kept.save("a", motion(1.0), 8)
    file = tmp_path / "a.safetensors"
    content = bytearray(file.read_bytes())
    content[int(len(content) * where)] ^= 0x55
    file.write_bytes(content)
    assert kept.load("a", SHAPE) is None
    assert not list(tmp_path.iterdir())
    kept.save("a", motion(2.0), 8)
    assert value_of(kept.load("a", SHAPE)) == 2.0


@pytest.mark.parametrize(
    "facts",
    [b"", b"{", b"[]", b"null", DEEP, {"sha256": "0" * 64}, {"sha256": None}, {"key": "b"}, {"fps": "x"}]
    + [{"fps": value} for value in (None, 0, -1, float("nan"), float("inf"))],
)
def test_k5_damaged_facts_of_a_motion_drop_it(tmp_path, facts):
    kept = MotionCache(tmp_path, 1e6)
    kept.save("a", motion(1.0), 8)
    path = tmp_path / "a.json"
    path.write_bytes(facts if isinstance(facts, bytes) else json.dumps(json.loads(path.read_bytes()) | facts).encode())
    assert kept.load("a", SHAPE) is None
    assert not list(tmp_path.iterdir())


def test_k2_a_motion_under_another_key_is_not_used(tmp_path):
    kept = MotionCache(tmp_path, 1e6)
    kept.save("a", motion(1.0), 8)
    for suffix in (".safetensors", ".json"):
        shutil.copy(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}")
    assert kept.load("b", SHAPE) is None
    assert value_of(kept.load("a", SHAPE)) == 1.0


@pytest.mark.parametrize("shape", [(5, 32, 32), (4, 40, 32), (4, 32, 40)])
def test_k2_a_motion_of_another_shape_is_not_used(tmp_path, shape):
    kept = MotionCache(tmp_path, 1e6)
    kept.save("a", motion(1.0), 8)
    assert kept.load("a", shape) is None


def test_k2_a_motion_that_version_0_1_wrote_belongs_to_the_key_that_first_uses_it(tmp_path):
    kept = MotionCache(tmp_path, 1e6)
    kept.save("a", motion(1.0), 8)
    facts = json.loads((tmp_path / "a.json").read_bytes())
    del facts["key"]
    (tmp_path / "a.json").write_text(json.dumps(facts))
    assert value_of(kept.load("a", SHAPE)) == 1.0
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"a{suffix}").rename(tmp_path / f"b{suffix}")
    assert kept.load("b", SHAPE) is None


def test_the_least_recently_used_go_first(tmp_path):
    kept = MotionCache(tmp_path, 1e6)
    kept.save("size", motion(0.0), 8)
    kept = MotionCache(tmp_path / "limited", 2.5 * kept.size())
    for key in "ab":
        kept.save(key, motion(1.0), 8)
    os.utime(tmp_path / "limited" / "b.json", (1, 1))
    assert kept.load("a", SHAPE)
    kept.save("c", motion(1.0), 8)
    assert [bool(kept.load(key, SHAPE)) for key in "abc"] == [True, False, True]
    assert kept.size() <= kept.limit


def test_a_motion_that_the_cache_cannot_hold_costs_no_other_its_place(tmp_path):
    """Neither if its tensors are too large, nor if only its file is, which has a header."""
    kept = MotionCache(tmp_path, 1e6)
    kept.save("a", motion(1.0), 8)
    fits, small = kept.size(), motion(1.0).bytes
    assert small < fits
    for limit in (small - 1, small, fits - 1):
        MotionCache(tmp_path, limit).save("b", motion(2.0), 8)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors"]
    MotionCache(tmp_path, fits).save("b", motion(2.0), 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.safetensors"]


def test_as_many_motions_are_kept_as_fit(tmp_path):
    kept = MotionCache(tmp_path, 1e6)
    kept.save("a", motion(1.0), 8)
    kept = MotionCache(tmp_path, 3 * kept.size())
    for number, key in enumerate("bcde"):
        os.utime(tmp_path / f"{chr(ord(key) - 1)}.json", (number, number))
        kept.save(key, motion(1.0), 8)
    assert [key for key in "abcde" if kept.load(key, SHAPE)] == ["c", "d", "e"]


def test_what_was_said_of_a_reference_is_kept_with_its_motion(tmp_path):
    kept = MotionCache(tmp_path / "cache" / "motion", 1e6)
    kept.save("a", motion(1.0), 8, ["it is cut short"])
    kept.save("b", motion(1.0), 8)
    assert [kept.warnings(key) for key in "abc"] == [("it is cut short",), (), ()]
    path = tmp_path / "cache" / "motion" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"warnings": [1]}))
    assert kept.warnings("a") == ()


def test_a_cache_that_is_off_gives_nothing_back(tmp_path):
    MotionCache(tmp_path, 1e6).save("a", motion(1.0), 8)
    assert MotionCache(tmp_path, 0).load("a", SHAPE) is None
    assert value_of(MotionCache(tmp_path, 1e6).load("a", SHAPE)) == 1.0


def test_no_cache_if_not_wanted(tmp_path):
    kept = MotionCache(tmp_path / "none", 0)
    kept.save("a", motion(1.0), 8)
    assert kept.load("a", SHAPE) is None
    assert not (tmp_path / "none").exists()


# ---- a cache that fails in a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a file", "no entries can be written", "entries that cannot be removed"])
def test_k5_a_run_goes_on_without_its_cache(tmp_path, how):
    folder, reference = Path(environment(tmp_path)["XDG_CACHE_HOME"]) / "emt", clip(tmp_path / "a.mp4")
    ask = [reference, "--prompt", "a", "--out", tmp_path / "out", "--json"]
    if how == "a file":
        folder.parent.mkdir()
        folder.write_bytes(b"")
    elif how == "no entries can be written":
        folder.mkdir(parents=True)
        (folder / "motion").write_bytes(b"")
    else:
        assert transfer(tmp_path, *ask).code == 0
        [facts] = (folder / "motion").glob("*.json")
        facts.unlink()
        facts.mkdir()
    ended = transfer(tmp_path, *ask, "--prompt", "b")
    assert ended.code == 0, ended.err
    assert {line["state"] for line in lines(ended)} <= {"done", "skipped"}
    about = [line for line in ended.err.splitlines() if "kept" in line or "cache" in line]
    assert 1 <= len(about) <= 2, ended.err


# ---- the key of a motion ------------------------------------------------------------------------------------------

JOB = Job(Path("/clips/a.mp4"), "a star", 0, Settings())


def key_of(job: Job = JOB, reference: str = "r", sha256: str = "m", device: Device | None = None) -> str:
    generator = Generator(find_model(str(model()), download=False), sha256, "cpu", "auto")
    generator._device = device or Device("cpu", "cpu", "fp32")
    return generator.motion_key(job, reference)


@pytest.mark.parametrize(
    "change",
    [
        {"reference": "another clip"},
        {"sha256": "another model"},
        {"device": Device("cuda:0", "another GPU", "fp32")},
        {"device": Device("cpu", "cpu", "bf16")},
        {"device": Device("cpu", "cpu", "fp32", "triton")},
        *(
            {"frames": 8},
            {"height": 256},
            {"width": 256},
            {"fit": Fit.PAD},
            {"start": 1.0},
            {"duration": 2.0},
            {"stride": 2},
        ),
    ],
    ids=str,
)
def test_k9_each_field_that_decides_a_motion_changes_its_key(change):
    if change.keys() & {"reference", "sha256", "device"}:
        assert key_of(**change) != key_of()
    else:
        assert key_of(replace(JOB, settings=replace(JOB.settings, **change))) != key_of()


def test_k9_what_does_not_decide_a_motion_leaves_its_key():
    settings = replace(JOB.settings, steps=3, guidance=2.0, scheduler=Scheduler.EULER, negative_prompt="dark", fps=3.0)
    assert key_of(Job(Path("/moved/b.mp4"), "a fox", 9, settings)) == key_of()
