"""Files behind URLs: named, listed, fetched and published, with a store in memory and a web server that fails."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import fsspec
import pytest

from emt import remote
from emt.errors import EmtError
from emt.remote import MissingError, distinct, fetch, fetch_folder, fetched, files, is_url, matching, normal, put, shown


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.001)


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


# ---- waiting ------------------------------------------------------------------------------------------------------


def test_k4_a_store_that_does_not_answer_is_named_while_it_is_waited_for(monkeypatch, caplog):
    """A listening socket that nobody accepts at: connections succeed, and nothing comes."""
    monkeypatch.setattr(remote, "SLOW", 0.05)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        closing = threading.Timer(0.6, silent.close)  # what is waited for then ends, in an error
        closing.start()
        with pytest.raises(EmtError, match="tried 2 times"):
            remote.stat(f"{place}/clip.mp4")
        closing.join()
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"waiting for {place}, which has not answered for 0.05 s"
    assert said[1].startswith(f"{place}/clip.mp4 cannot be read yet: ")
    assert len(said) == 2, "each once"


def test_k4_attempts_at_s3_are_counted_here_alone(monkeypatch):
    """botocore makes five of each attempt, with seconds between them, and says nothing."""
    pytest.importorskip("s3fs")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"signature_version": "s3v4"}})
    system, _ = remote._filesystem("s3://bucket/clip.mp4")
    assert system.config_kwargs == {"retries": {"total_max_attempts": 1}, "signature_version": "s3v4"}


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["s3://b/a.mp4", "https://h/a", "gs:/b/a", Path("s3://b/a.mp4"), PureWindowsPath("s3://b/a.mp4")]
)
def test_urls_are_urls_even_when_a_path_was_made_of_them(text):
    assert is_url(text)
    assert normal(text).partition("://")[1] == "://"


@pytest.mark.parametrize(
    "text", [r"C:\clips", "C:/clips", "c://clips", "clips/a:b.mp4", "file:///tmp/a", "", None, "-"]
)
def test_paths_are_no_urls(text):
    assert not is_url(text)


def test_a_file_url_is_a_path():
    assert remote.to_path("file:///tmp/two%20words.mp4") == Path("/tmp/two words.mp4")
    assert remote.to_path(r"C:\clips") == Path(r"C:\clips")


@pytest.mark.parametrize("text", ["s3://", "https:///", "memory:/", "file://"])
def test_k5_a_scheme_alone_is_no_url(text):
    assert not is_url(text)
    assert not is_url(Path(text))


def test_k2_a_folder_in_two_spellings_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("out")
    given = ["b", "out", "./out/", str(tmp_path / "out"), "link", f"file://{tmp_path}/out", "s3://a/b", "s3://a/b/"]
    assert list(map(str, distinct(list(map(Path, given))))) == ["b", "out", "s3:/a/b"]


def test_secrets_of_urls_are_not_shown():
    signed = "https://me:word@host/a/b.mp4?X-Amz-Signature=abc&x=1"
    assert shown(signed) == "https://host/a/b.mp4?…"
    assert shown("https://host/get?id=5") == "https://host/get?id=5"
    assert shown("ftp://me:word@host/a.mp4") == "ftp://host/a.mp4"
    assert shown("abfs://clips@account/a.mp4") == "abfs://clips@account/a.mp4", "a container is no user"
    assert shown("s3://bucket/a?b") == "s3://bucket/a?b", "a key of S3 may have any character"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://b/clips/walk 1.mp4", "walk 1.mp4"),
        ("https://h/a%20b.mp4?token=x/y", "a b.mp4"),
        ("s3://b/..", "file"),
        ("s3://b/a:b|c.mp4", "a_b_c.mp4"),
        (f"s3://b/{'ä' * 300}.mp4", f"{'ä' * 75}.mp4"),
    ],
)
def test_copies_have_names_that_any_disk_takes(url, name):
    assert remote.file_name(url) == name


# ---- listing and fetching -----------------------------------------------------------------------------------------


def test_folders_and_globs_are_listed(store):
    for name in ("clips/b.mp4", "clips/a.mp4", "clips/deep/c.mp4", "other.txt"):
        store.pipe(f"/bucket/{name}", name.encode())
    assert set(files("memory://bucket/clips")) == {"b.mp4", "a.mp4", "deep/c.mp4"}
    assert set(files("memory://bucket/clips", recursive=False)) == {"b.mp4", "a.mp4"}
    assert files("memory://bucket/none") == {}
    assert set(matching("memory://bucket/clips/*.mp4")) == {
        "memory://bucket/clips/a.mp4",
        "memory://bucket/clips/b.mp4",
    }
    assert "memory://bucket/clips/deep/c.mp4" in matching("memory://bucket/**/*.mp4")
    assert remote.stat("memory://bucket/clips").is_folder


def test_a_file_is_fetched_once_and_again_when_it_has_changed(store, monkeypatch):
    store.pipe("/b/walk.mp4", b"one")
    reads = []
    monkeypatch.setattr(remote, "_load", lambda *a, load=remote._load: reads.append(a[0]) or load(*a))
    path = fetch("memory://b/walk.mp4")
    assert (path.name, path.read_bytes()) == ("walk.mp4", b"one")
    assert fetch("memory://b/walk.mp4") == path == fetched("memory://b/walk.mp4")
    assert len(reads) == 1
    store.pipe("/b/walk.mp4", b"two")
    assert fetch("memory://b/walk.mp4").read_bytes() == b"two"
    assert fetched("memory://b/other.mp4") is None


def test_large_files_come_in_ranges_and_go_on_where_they_stopped(store, monkeypatch):
    content = os.urandom(1000)
    store.pipe("/b/large.mp4", content)
    monkeypatch.setattr(remote, "_BLOCK", 300)
    asked: list[int] = []
    real = type(store).cat_file

    def cut(self, path, start=None, end=None, **options):
        asked.append(start)
        if start == 600 and asked.count(600) <= remote.ATTEMPTS:
            raise ConnectionResetError("connection reset by peer")
        return real(self, path, start, end, **options)

    monkeypatch.setattr(type(store), "cat_file", cut)
    with pytest.raises(
        EmtError, match=r"memory://b/large.mp4 cannot be read: connection reset by peer \(tried 5 times\)"
    ):
        fetch("memory://b/large.mp4")
    assert fetched("memory://b/large.mp4") is None, "half of a file has not its name"
    seen = []
    path = fetch("memory://b/large.mp4", lambda name, done, total: seen.append((name, done, total)))
    assert path.read_bytes() == content
    assert asked.count(0) == 1, "what had come was not fetched again"
    assert seen[-1] == ("large.mp4", 1000, 1000)


def test_a_file_that_changes_while_it_is_fetched_is_not_a_mixture(store, monkeypatch):
    store.pipe("/b/a.mp4", b"a" * 900)
    monkeypatch.setattr(remote, "_BLOCK", 300)
    real, calls = type(store).cat_file, []

    def change(self, path, start=None, end=None, **options):
        calls.append(start)
        if len(calls) == 2:
            store.pipe("/b/a.mp4", b"b" * 900)
        return real(self, path, start, end, **options)

    monkeypatch.setattr(type(store), "cat_file", change)
    assert fetch("memory://b/a.mp4").read_bytes() == b"b" * 900


def test_a_folder_is_fetched_and_follows_its_store(store):
    for name, content in {"model_index.json": b"{}", "unet/a.safetensors": b"w", "notes.md": b"no"}.items():
        store.pipe(f"/b/model/{name}", content)

    def content(names: list[str]) -> list[str]:
        return [name for name in names if not name.endswith(".md")]

    folder = fetch_folder("memory://b/model", content)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"model_index.json", "unet/a.safetensors"}
    store.pipe("/b/model/unet/b.safetensors", b"new")
    store.rm("/b/model/unet/a.safetensors")
    assert fetch_folder("memory://b/model", content) == folder == fetched("memory://b/model")
    assert [path.name for path in (folder / "unet").iterdir()] == ["b.safetensors"]
    with pytest.raises(MissingError, match="memory://b/none does not exist"):
        fetch_folder("memory://b/none", content)
    # A part of it has a copy of its own.
    part = fetch_folder("memory://b/model", lambda names: ["model_index.json"], part="vae")
    assert [path.name for path in part.iterdir()] == ["model_index.json"]
    assert fetched("memory://b/model", "vae") == part != folder
    assert (folder / "unet" / "b.safetensors").exists()


def test_names_that_lead_out_of_a_folder_are_not_fetched(store, monkeypatch):
    listing = {f"/b/model/{name}": {"size": 1, "type": "file", "ETag": "x"} for name in ("../../evil.json", "a.json")}
    monkeypatch.setattr(type(store), "find", lambda *a, **k: listing)
    assert set(files("memory://b/model")) == {"a.json"}


def test_old_copies_make_room_and_young_ones_stay(store):
    store.pipe("/b/old.mp4", b"x" * 100)
    store.pipe("/b/new.mp4", b"x" * 100)
    old, new = fetch("memory://b/old.mp4"), fetch("memory://b/new.mp4")
    os.utime(old.parent / "source.json", (1, 1))
    remote.trim_copies(1e9)
    assert old.exists()
    remote.trim_copies(0)
    assert (old.exists(), new.exists()) == (False, True)


# ---- publishing ---------------------------------------------------------------------------------------------------


def test_a_file_is_published_whole_or_not_at_all(store, tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"clip")
    found = put(tmp_path / "a.mp4", "memory://b/out/a.mp4")
    assert (found.size, store.cat("/b/out/a.mp4")) == (4, b"clip")
    assert found == remote.stat("memory://b/out/a.mp4")
    # In a store whose puts are not atomic a temporary object is renamed.
    monkeypatch.setattr(remote, "_ATOMIC", set())
    names, real = [], type(store).put_file
    monkeypatch.setattr(type(store), "put_file", lambda self, a, b, **k: names.append(b) or real(self, a, b))
    put(tmp_path / "a.mp4", "memory://b/out/b.mp4")
    assert names[0].rpartition("/")[2].startswith(".emt-partial-")
    assert set(files("memory://b/out")) == {"a.mp4", "b.mp4"}


def test_the_web_is_for_reading():
    with pytest.raises(EmtError, match="https://host/out can only be read"):
        remote.check_writable("https://host/out")


# ---- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "problem", "hint"),
    [
        ("memory://b/none.mp4", "memory://b/none.mp4 does not exist", "Check the URL"),
        ("foo://b/x", "foo:// of foo://b/x is not known", "s3://, gs://, az://"),
        ("zip://a.mp4::memory://b/a.zip", "chain of URLs", "the file itself"),
    ],
)
def test_bad_urls_are_one_error(url, problem, hint):
    with pytest.raises(EmtError) as caught:
        remote.stat(url)
    assert problem in caught.value.problem
    assert hint in caught.value.hint


@pytest.mark.parametrize(("url", "extra"), [("s3://b/x", "s3"), ("gs://b/x", "gcs"), ("az://b/x", "azure")])
def test_a_store_without_its_package_says_what_to_install(url, extra, monkeypatch):
    def missing(*a, **k):
        raise ImportError("Install it to access it")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(EmtError) as caught:
        remote.stat(url)
    assert caught.value.hint == f"pip install 'emt-cli[{extra}]'"


class Web(http.server.BaseHTTPRequestHandler):
    """A web server without ranges; a path of digits is answered by those statuses in turn before the content."""

    faults: dict[str, list[int]] = {}  # noqa: RUF012
    content = b"prompt one\nprompt two\n"
    redirections: dict[str, str] = {}  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        if to := self.redirections.get(self.path):
            self.send_response(302)
            self.send_header("Location", to)
            self.end_headers()
            return
        left = self.faults.get(self.path, [])
        status = left.pop(0) if left else 200
        if status != 200:
            self.send_error(status)
            return
        self._answer(self.content)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_web_is_read_and_what_passes_is_tried_again(web):
    Web.faults = {"/prompts.txt?a=1": [503, 429], "/down.txt": [503] * 99, "/secret.txt": [403] * 99}
    assert fetch(f"{web}/prompts.txt?a=1").read_bytes() == Web.content
    assert fetch(f"{web}/prompts.txt?a=1").name == "prompts.txt"
    with pytest.raises(EmtError, match=r"down.txt cannot be read: .*503.*\(tried 5 times\)"):
        fetch(f"{web}/down.txt")
    with pytest.raises(EmtError, match=r"secret.txt cannot be read: access is denied"):
        fetch(f"{web}/secret.txt")


def test_k7_what_redirects_nowhere_is_said_and_so_is_a_status(web):
    Web.redirections = {"/round.txt": "/round.txt", "/here.txt": "file:///etc/passwd", "/moved.txt": "/there.txt"}
    Web.faults = {"/401.txt": [401] * 99}
    for name, said in (
        ("round", "cannot be read: it redirects without an end"),
        ("here", "cannot be read: it redirects to what is no web address"),
        ("401", r"cannot be read: access is denied \(401, message='Unauthorized'"),
    ):
        with pytest.raises(EmtError, match=said):
            fetch(f"{web}/{name}.txt")
    assert fetch(f"{web}/moved.txt").read_bytes() == Web.content


def test_nobody_listens(tmp_path):
    with pytest.raises(EmtError, match=r"http://127.0.0.1:9/a.mp4 cannot be read: .*\(tried 5 times\)") as caught:
        fetch("http://127.0.0.1:9/a.mp4")
    assert "network" in caught.value.hint
