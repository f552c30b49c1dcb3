"""References, prompts, models and output folders in an S3 store: a real client, a server on loopback, and faults."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import object_store
import pytest
import torch
from object_store import BUCKET, Proxy, Store
from program import Ended, Run, clip, environment, lines, model
from safetensors.torch import save_file

from emt import remote
from emt.errors import EmtError

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


def begin(store: Store, folder: Path, *arguments: object, endpoint: str = "", stdin: bytes = b"") -> Run:
    """`emt` in a folder, with a cache of its own, running."""
    variables = environment(folder) | store.environment(endpoint)
    return Run(*map(str, arguments), folder=folder, environment=variables, stdin=stdin)


def run(store: Store, folder: Path, *arguments: object, **options) -> Ended:
    return begin(store, folder, *arguments, **options).end()


def start(store: Store, folder: Path, *arguments: object, **options) -> Run:
    return begin(store, folder, "transfer", "--device", "cpu", "--model", model(), *arguments, **options)


def transfer(store: Store, folder: Path, *arguments: object, **options) -> Ended:
    return start(store, folder, *arguments, **options).end()


def states(ended: Ended) -> dict[str, int]:
    return dict(Counter(line["state"] for line in lines(ended) if line["event"] == "job"))


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


def test_a_clip_of_a_url_is_made_again_from_its_copy_and_nothing_is_fetched_on_a_records_word(store, clips, tmp_path):
    made = transfer(store, tmp_path, f"{ROOT}/clips/walk.mp4", "--prompt", "x", "--model", f"{ROOT}/model")
    assert made.code == 0, made.err
    result = tmp_path / made.out.strip()
    record = json.loads(result.with_name(result.name + ".json").read_bytes())
    assert (record["reference"], record["model"]) == (f"{ROOT}/clips/walk.mp4", f"{ROOT}/model")
    rerun = ("rerun", result, "--device", "cpu", "--overwrite")
    nowhere = "http://127.0.0.1:9"
    assert "identical with the original" in run(store, tmp_path, *rerun, endpoint=nowhere).err, "nothing is fetched"
    shutil.rmtree(tmp_path / "cache")
    ended = run(store, tmp_path, *rerun)
    assert ended.code == 1
    assert f"--model {ROOT}/model" in ended.err
    ended = run(store, tmp_path, *rerun, "--model", model())
    assert ended.code == 1
    assert f"--reference {ROOT}/clips/walk.mp4" in ended.err
    ended = run(store, tmp_path, *rerun, "--model", f"{ROOT}/model", "--reference", f"{ROOT}/clips/walk.mp4")
    assert "identical with the original" in ended.err


@pytest.fixture(scope="module")
def addons(store, tmp_path_factory) -> Path:
    """A LoRA, a VAE and an embedding on disk that are in the store, too; and a LoRA of PEFT's, of two files."""
    from emt.pipeline import load_pipeline

    pipe, folder = load_pipeline(model()), tmp_path_factory.mktemp("addons")
    target = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    rows, columns = pipe.unet.get_parameter(f"{target}.weight").shape
    down, up = (torch.full(shape, 0.1) for shape in ((2, columns), (rows, 2)))
    key = f"lora_unet_{target.replace('.', '_')}"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, folder / "a.safetensors")
    save_file({name: p.detach() / 2 for name, p in pipe.vae.named_parameters()}, folder / "vae.safetensors")
    save_file({"emb_params": torch.ones(2, 32)}, folder / "word.safetensors")
    (folder / "peft").mkdir()
    names = {f"base_model.model.{target}.lora_{side}.weight": x for side, x in (("A", down), ("B", up))}
    save_file(names, folder / "peft" / "adapter_model.safetensors")
    (folder / "peft" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6, "peft_type": "LORA"}')
    for path in folder.rglob("*.*"):
        store.put(f"addons/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return folder


def test_loras_a_vae_and_embeddings_by_url_make_the_jobs_that_they_make_by_path(store, clips, addons, tmp_path):
    def options(place: object) -> list[str]:
        files = [f"--lora={place}/a.safetensors:0.8", f"--vae={place}/vae.safetensors"]
        return [*files, f"--embedding=style={place}/word.safetensors", "--lora", f"{place}/peft:0.5"]

    job = (clips / "walk.mp4", "--prompt", "a style fox", "--json")
    [made] = lines(transfer(store, tmp_path, *job, *options(f"{ROOT}/addons")))
    assert made["state"] == "done", made
    assert {file["kind"] for file in made["addons"]} == {"lora", "vae", "embedding"}
    [again] = lines(transfer(store, tmp_path, *job, *options(addons)))
    assert (again["state"], again["id"]) == ("skipped", made["id"])
    # PEFT's file by its own name comes with what scales it.
    text = {"reference": f"{ROOT}/clips/walk.mp4", "prompt": "a style fox", "vae": f"{ROOT}/addons/vae.safetensors"}
    text |= {"lora": [f"{ROOT}/addons/a.safetensors:0.8", f"{ROOT}/addons/peft/adapter_model.safetensors:0.5"]}
    text |= {"embedding": [f"style={ROOT}/addons/word.safetensors"]}
    line = json.dumps(text).encode()
    [again] = lines(transfer(store, tmp_path, "-", "--json", stdin=line))
    assert again["id"] == made["id"]

    result, nowhere = tmp_path / made["path"], "http://127.0.0.1:9"
    rerun = ("rerun", result, "--device", "cpu", "--overwrite")
    assert "identical with the original" in run(store, tmp_path, *rerun, endpoint=nowhere).err, "nothing is fetched"
    shutil.rmtree(tmp_path / "cache")
    ended = run(store, tmp_path, *rerun)
    assert ended.code == 1
    assert f"To fetch it: --addon {ROOT}/addons/" in ended.err
    named = ("a.safetensors", "vae.safetensors", "word.safetensors", "peft")
    fetched = [argument for name in named for argument in ("--addon", f"{ROOT}/addons/{name}")]
    ended = run(store, tmp_path, *rerun, *fetched)
    assert "identical with the original" in ended.err, ended.err


def test_an_addon_by_url_that_is_not_there_is_one_line(store, clips, tmp_path):
    missing = f"{ROOT}/none.safetensors"
    for option in (f"--lora={missing}:0.8", f"--vae={missing}", f"--embedding=style={missing}"):
        ended = transfer(store, tmp_path, clips / "walk.mp4", "--prompt", "x", option)
        assert ended.code in (1, 2)
        assert f"{missing} does not exist" in ended.err
        assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["s3://no-such-bucket/a.mp4", "--prompt", "x"], "s3://no-such-bucket/a.mp4 does not exist"),
        (["s3://Not_A_Bucket!/a.mp4", "--prompt", "x"], "s3://Not_A_Bucket!/a.mp4"),
        (["a.mp4", "--prompts", f"{ROOT}/none.txt"], f"{ROOT}/none.txt does not exist"),
        (["a.mp4", "--prompt", "x", "--model", f"{ROOT}/clips"], "model_index.json"),
        (["a.mp4", "--prompt", "x", "--out", "s3://no-such-bucket/out"], "cannot write to s3://no-such-bucket/out: "),
    ],
)
def test_bad_urls_are_one_line(store, clips, tmp_path, arguments, told):
    clip(tmp_path / "a.mp4")
    ended = transfer(store, tmp_path, *arguments)
    assert ended.code in (1, 2), ended.out
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) < 6, ended.err
    assert not list(tmp_path.glob("s3*")), "no folder is called like a URL"


# ---- output folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy(store) -> Iterator[Proxy]:
    proxy = Proxy(store)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def no_faults(request):
    if "proxy" in request.fixturenames:
        request.getfixturevalue("proxy").reset()


def machine(tmp_path: Path, name: str) -> Path:
    """A working folder with a cache of its own."""
    (tmp_path / name).mkdir(exist_ok=True)
    return tmp_path / name


def test_an_output_folder_in_a_store_is_continued_by_another_machine(store, clips, proxy, tmp_path):
    out = f"{ROOT}/shared/out"
    one, other = machine(tmp_path, "one"), machine(tmp_path, "other")
    cache = ("--cache-dir", f"{ROOT}/shared/cache")
    made = transfer(store, one, clips, "--prompt", "x", "--out", out, *cache)
    assert made.code == 0, made.err
    assert len(store.keys("shared/cache/motion/")) == 4, "motion features of two references"
    urls = made.out.splitlines()
    keys = store.keys("shared/out/")
    assert sorted(f"{ROOT}/{key}" for key in keys if key.endswith(".mp4")) == sorted(urls)
    journals = [key for key in keys if "journal" in key]
    assert len(journals) == 1, "one part for all lines"
    assert len(keys) == 5, "two clips, two sidecars, a part of a journal"
    assert not list(one.rglob("x-0.mp4")), "what is published is not kept twice"
    known = [json.loads(line) for line in store.get(journals[0]).splitlines()]
    assert {line["output"] for line in known if line["event"] == "job"} == {url.removeprefix(f"{out}/") for url in urls}

    both = ("--prompt", "x", "--prompt", "y", "--out", out, "--json")
    plan = run(store, other, "plan", clips, *both, "--model", model(), endpoint=proxy.endpoint)
    assert states(plan) == {"done": 2, "open": 2}
    resumed = transfer(store, other, clips, *both, *cache, endpoint=proxy.endpoint)
    assert states(resumed) == {"skipped": 2, "done": 2}, resumed.err
    assert {line["path"] for line in lines(resumed) if line["state"] == "skipped"} == set(urls)
    assert not [request for request in proxy.requests if re.match(r"GET \S+\.mp4 ", request)], "no clip is fetched"
    assert sum("GET /clips/shared/cache/motion/" in request for request in proxy.requests) == 4, "nothing is encoded"
    assert states(transfer(store, one, clips, *both)) == {"skipped": 4}
    again = run(store, other, "rerun", urls[0], "--device", "cpu")
    assert f"{urls[0].replace('.mp4', '-rerun.mp4')} is identical with the original" in again.err
    assert again.out.strip() == urls[0].replace(".mp4", "-rerun.mp4")
    assert again.out.strip().removeprefix(f"{ROOT}/") in store.keys("shared/out/")


def test_reports_and_measures_are_put_where_the_clips_are(store, clips, tmp_path):
    out = f"{ROOT}/gallery"
    one, other = machine(tmp_path, "one"), machine(tmp_path, "other")
    assert transfer(store, one, f"{ROOT}/clips/run.mp4", "--prompt", "x", "--out", out, "--report").code == 0
    page = store.get("gallery/report.html").decode()
    assert "x-0.mp4" in page
    references = [key for key in store.keys("gallery/report/") if key.endswith(".mp4")]
    assert len(references) == 1, "the page has a copy of the reference"
    measured = run(store, other, "evaluate", out, "--json", "--text-model", "none")
    assert measured.code == 1
    assert "--fetch" in measured.err, "nothing is fetched on the word of a journal"
    measured = run(store, other, "evaluate", out, "--json", "--text-model", "none", "--fetch")
    assert measured.code == 0, measured.err
    assert store.get("gallery/metrics.jsonl").splitlines() == measured.out.encode().splitlines()


def test_a_run_that_is_killed_while_it_publishes_loses_nothing_and_makes_nothing_twice(store, clips, proxy, tmp_path):
    for number, moment in enumerate(("x-0.mp4 ", "x-0.mp4.json ", "journal-")):
        out, count = f"{ROOT}/killed/{number}", 0
        one, other = machine(tmp_path, f"one{number}"), machine(tmp_path, f"other{number}")
        job = (clips / "run.mp4", "--prompt", "x", "--out", out)
        running = start(store, one, *job, endpoint=proxy.endpoint)

        def kill(request: bytes, moment: str = moment, running: Run = running) -> bytes | None:
            nonlocal count
            first = request.split(b"\r\n", 1)[0].decode()
            if first.startswith("PUT") and moment in first:
                count += 1
                if count == (2 if moment == "journal-" else 1):  # the first part is empty
                    running.send(signal.SIGKILL)
                    return b""
            return None

        proxy.fault = kill
        assert running.end().code == -signal.SIGKILL, moment
        proxy.reset()
        before = [key for key in store.keys(f"killed/{number}/") if key.endswith(".mp4")]
        assert len(before) == (0 if moment == "x-0.mp4 " else 1)
        # The same machine has the clip that was not put; another one reads what was put from the clip itself.
        resumed = transfer(store, other if number == 1 else one, *job, "--json")
        assert states(resumed) == {"skipped": 1}, moment
        assert len([key for key in store.keys(f"killed/{number}/") if key.endswith(".mp4")]) == 1
        journals = [store.get(key) for key in store.keys(f"killed/{number}/") if "journal-" in key]
        assert b"".join(journals).count(b'"state": "done"') == 1, "it is done once"


def test_a_clip_that_cannot_be_put_fails_with_one_line_and_is_put_by_the_next_run(store, clips, proxy, tmp_path):
    out = f"{ROOT}/refused"
    proxy.fault = lambda r: (
        object_store.refusal(503, "SlowDown") if b"/x-0.mp4 " in r.split(b"\r\n")[0] and r[:3] == b"PUT" else None
    )
    job = (clips / "run.mp4", "--prompt", "x", "--prompt", "y", "--out", out)
    ended = transfer(store, tmp_path, *job, endpoint=proxy.endpoint)
    assert ended.code == 1
    [told] = [line for line in ended.err.splitlines() if "FAILED" in line]
    assert "x-0.mp4 cannot be written" in told
    assert "give the same command again to publish it" in told
    assert "1 done, 0 already there, 1 failed" in ended.err, "the others went on"
    proxy.reset()
    again = transfer(store, tmp_path, *job, "--json", endpoint=proxy.endpoint)
    assert states(again) == {"skipped": 2}, "it was made, and only put"
    assert len([key for key in store.keys("refused/") if key.endswith(".mp4")]) == 2


def test_credentials_that_expire_are_named_as_such(store, clips, proxy, tmp_path):
    out = f"{ROOT}/expired"
    expired = False

    def expire(request: bytes) -> bytes | None:
        """From the moment on when the clip is about to be published."""
        nonlocal expired
        expired = expired or b"x-0.mp4" in request.split(b"\r\n")[0]
        return object_store.refusal(400, "ExpiredToken") if expired else None

    proxy.fault = expire
    job = (clips / "run.mp4", "--prompt", "x", "--out", out)
    ended = transfer(store, tmp_path, *job, endpoint=proxy.endpoint)
    assert ended.code == 1
    assert "cannot be read: the credentials have expired" in ended.err
    assert "Renew them, then give the same command again" in ended.err
    proxy.reset()
    assert states(transfer(store, tmp_path, *job, "--json", endpoint=proxy.endpoint)) == {"skipped": 1}


def test_a_folder_that_is_not_there_is_named_as_it_was_given(store, tmp_path):
    for command in ("report", "evaluate"):
        ended = run(store, tmp_path, command, f"{ROOT}/none")
        assert ended.code == 1
        assert f"{ROOT}/none has no journal" in ended.err


# ---- faults -------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(store, proxy, tmp_path, monkeypatch) -> Iterator[Proxy]:
    """The store as this process sees it: through a proxy, with a cache of its own."""
    from s3fs import S3FileSystem

    for name, value in (store.environment(proxy.endpoint) | {"XDG_CACHE_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "_BLOCK", 100_000)
    S3FileSystem.clear_instance_cache()
    yield proxy
    S3FileSystem.clear_instance_cache()


CONTENT = bytes(range(256)) * 1000


def requests(proxy: Proxy, kind: str) -> int:
    return sum(request.startswith(kind) for request in proxy.requests)


def test_downloads_go_on_after_dropped_connections(store, client):
    store.put("large.bin", CONTENT)
    client.cut = [1, 5_000, 50_000]
    assert remote.fetch(f"{ROOT}/large.bin").read_bytes() == CONTENT
    assert requests(client, "GET") >= 5, "three ranges, and again what was cut"
    client.reset()
    assert remote.fetch(f"{ROOT}/large.bin").read_bytes() == CONTENT
    assert requests(client, "GET") == 0, "the copy is of the same version"


def test_a_download_that_failed_goes_on_in_the_next_run(store, client):
    store.put("later.bin", CONTENT)
    seen = []
    client.fault = lambda request: b"" if b"bytes=200000" in request else None
    with pytest.raises(EmtError, match=rf"{ROOT}/later.bin cannot be read: .* \(tried 5 times\)") as caught:
        remote.fetch(f"{ROOT}/later.bin", lambda name, done, total: seen.append(done))
    assert "give the same command again" in caught.value.hint
    assert seen == [100_000, 200_000]
    client.reset()
    assert remote.fetch(f"{ROOT}/later.bin").read_bytes() == CONTENT
    assert requests(client, "GET") == 1, "what had come is not fetched again"


def test_slow_answers_are_waited_for_and_stalled_ones_are_asked_for_again(store, client, monkeypatch):
    store.put("slow.bin", CONTENT)
    client.pause = 0.01
    assert remote.fetch(f"{ROOT}/slow.bin").read_bytes() == CONTENT
    store.put("slow.bin", CONTENT[::-1])
    client.reset()
    monkeypatch.setattr(type(fsspec.filesystem("s3")), "read_timeout", 2)
    fsspec.filesystem("s3").clear_instance_cache()
    stalled = []

    def stall(request: bytes) -> bytes | None:
        if request.startswith(b"GET") and not stalled:
            stalled.append(request)
            time.sleep(4)  # longer than the client waits
        return None

    client.fault = stall
    assert remote.fetch(f"{ROOT}/slow.bin").read_bytes() == CONTENT[::-1]
    assert stalled


def test_a_store_that_is_busy_is_asked_again(store, client, tmp_path):
    left = [503, 500, 429]

    def busy(request: bytes) -> bytes | None:
        return object_store.refusal(left.pop(), "SlowDown") if left and request[:3] != b"HEA" else None

    client.fault = busy
    assert remote.put(CONTENT, f"{ROOT}/busy.bin").size == len(CONTENT)
    assert not left
    left.extend((503, 500, 429))
    assert remote.fetch(f"{ROOT}/busy.bin").read_bytes() == CONTENT
    assert not left


def test_nothing_half_has_a_name(store, client, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(CONTENT)
    client.fault = lambda request: b"" if request.startswith(b"PUT") else None
    with pytest.raises(EmtError, match=r"half/clip.mp4 cannot be written: .* \(tried 5 times\)"):
        remote.put(tmp_path / "clip.mp4", f"{ROOT}/half/clip.mp4")
    assert store.keys("half/") == []
    dropped = []
    client.fault = lambda request: b"" if request[:3] == b"PUT" and not dropped and not dropped.append(1) else None
    remote.put(tmp_path / "clip.mp4", f"{ROOT}/half/clip.mp4")
    assert store.get("half/clip.mp4") == CONTENT


def test_credentials_are_looked_for_again_when_they_have_expired(store, client):
    store.put("renewed.bin", CONTENT)
    expired = []

    def expire_once(request: bytes) -> bytes | None:
        if request.startswith(b"GET") and not expired:
            expired.append(request)
            return object_store.refusal(400, "ExpiredToken")
        return None

    client.fault = expire_once
    assert remote.fetch(f"{ROOT}/renewed.bin").read_bytes() == CONTENT, "somebody has renewed them meanwhile"
    client.fault = lambda request: object_store.refusal(403, "InvalidAccessKeyId")
    with pytest.raises(EmtError, match="access is denied") as caught:
        remote.fetch(f"{ROOT}/renewed.bin")
    assert "aws sso login" in caught.value.hint
