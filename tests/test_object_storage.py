"""References, prompts, models and output folders in an S3 store: a real client, a server on loopback, and faults."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import object_store
import pytest
from object_store import BUCKET, Store
from program import Run, clip, environment, lines, model

ROOT = f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store.running() as store:
        yield store


@pytest.fixture(scope="module")
def clips(store, tmp_path_factory) -> Path:
    """Two clips on disk that are in the store, too."""
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(("walk.mp4", "run.mp4")):
        store.put(f"clips/{name}", clip(folder / name, number).read_bytes())
    store.put("clips/walk.txt", b"a red star\n")
    store.put("prompts.txt", b"a red star\n")
    for path in model().rglob("*"):
        if path.is_file():
            store.put(f"model/{path.relative_to(model()).as_posix()}", path.read_bytes())
    return folder


def run(store: Store, folder: Path, *arguments: object, endpoint: str = "", stdin: bytes = b""):
    """`emt` in a folder, with a cache of its own, to its end."""
    variables = environment(folder) | store.environment(endpoint)
    return Run(*map(str, arguments), folder=folder, environment=variables, stdin=stdin).end()


def transfer(store: Store, folder: Path, *arguments: object, **options):
    return run(store, folder, "transfer", "--device", "cpu", "--model", model(), *arguments, **options)


def states(ended) -> dict[str, int]:
    return dict(Counter(line["state"] for line in lines(ended)))


def test_a_clip_by_url_is_the_same_job_as_by_path(store, clips, tmp_path):
    made = transfer(store, tmp_path, f"{ROOT}/clips/*.mp4", "--prompts", f"{ROOT}/prompts.txt", "--json")
    assert made.code == 0, made.err
    assert states(made) == {"done": 2}
    assert {line["reference"] for line in lines(made)} == {f"{ROOT}/clips/walk.mp4", f"{ROOT}/clips/run.mp4"}
    again = transfer(store, tmp_path, clips, "--prompt", "a red star", "--json")
    assert states(again) == {"skipped": 2}, again.err
    job = json.dumps({"reference": f"{ROOT}/clips/walk.mp4", "prompt": "a red star"}).encode()
    assert states(transfer(store, tmp_path, "-", "--json", stdin=job)) == {"skipped": 1}
    # Without prompts those beside the clips count; run.mp4 has none.
    beside = transfer(store, tmp_path, f"{ROOT}/clips", "--json")
    assert states(beside) == {"skipped": 1, "failed": 1}
    assert "write run.txt beside the clip" in beside.out
    plan = run(store, tmp_path, "plan", f"{ROOT}/clips/", "--prompt", "a red star", "--model", model(), "--json")
    assert {line["state"] for line in lines(plan)[:-1]} == {"done"}, plan.err


def test_a_clip_of_a_url_is_made_again_from_its_copy_and_nothing_is_fetched_on_a_records_word(store, clips, tmp_path):
    made = transfer(store, tmp_path, f"{ROOT}/clips/walk.mp4", "--prompt", "x", "--model", f"{ROOT}/model")
    assert made.code == 0, made.err
    result = tmp_path / made.out.strip()
    record = json.loads(result.with_name(result.name + ".json").read_bytes())
    assert (record["reference"], record["model"]) == (f"{ROOT}/clips/walk.mp4", f"{ROOT}/model")
    rerun = ("rerun", result, "--device", "cpu", "--overwrite")
    assert "identical with the original" in run(store, tmp_path, *rerun).err
    nowhere = "http://127.0.0.1:9"
    assert "identical with the original" in run(store, tmp_path, *rerun, endpoint=nowhere).err, "nothing is fetched"
    shutil.rmtree(tmp_path / "cache")
    ended = run(store, tmp_path, *rerun)
    assert ended.code == 1
    assert f"--model {ROOT}/model" in ended.err
    ended = run(store, tmp_path, *rerun, "--model", f"{ROOT}/model")
    assert ended.code == 1
    assert f"--reference {ROOT}/clips/walk.mp4" in ended.err
    ended = run(store, tmp_path, *rerun, "--model", f"{ROOT}/model", "--reference", f"{ROOT}/clips/walk.mp4")
    assert "identical with the original" in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([f"{ROOT}/none.mp4", "--prompt", "x"], f"{ROOT}/none.mp4 does not exist"),
        ([f"{ROOT}/none/*.mp4", "--prompt", "x"], f"{ROOT}/none/*.mp4 does not exist"),
        (["s3://no-such-bucket/a.mp4", "--prompt", "x"], "s3://no-such-bucket/a.mp4 does not exist"),
        (["S3://Not_A_Bucket!/a.mp4", "--prompt", "x"], "s3://Not_A_Bucket!/a.mp4"),
        (["foo://b/a.mp4", "--prompt", "x"], "Known are s3://, gs://, az://"),
        (["a.mp4", "--prompts", f"{ROOT}/none.txt"], f"{ROOT}/none.txt does not exist"),
        (["a.mp4", "--prompt", "x", "--model", f"{ROOT}/clips"], "model_index.json"),
        (["a.mp4", "--prompt", "x", "--model", f"{ROOT}/none"], f"{ROOT}/none does not exist"),
    ],
)
def test_bad_urls_are_one_line(store, clips, tmp_path, arguments, told):
    clip(tmp_path / "a.mp4")
    ended = transfer(store, tmp_path, *arguments)
    assert ended.code in (1, 2), ended.out
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) < 6, ended.err
