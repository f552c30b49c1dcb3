"""References, a model, a cache and OUT by `az://`: the real client against Azurite, Azure's own emulator, on loopback.

Azurite is a program of Node's (`npm install -g azurite`), the client is of the extra `azure`; without them these tests
are skipped.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from program import Ended, Run, clip, environment, lines, model

AZURITE = shutil.which("azurite-blob")
ROOT = "az://clips"
#: Account and key of every Azurite, from its manual.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not AZURITE, reason="Azurite is not installed")]


def connection(port: int, key: str = KEY) -> str:
    place = f"http://127.0.0.1:{port}/{ACCOUNT}"
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={place};"


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    """Port of an Azurite with two clips, their prompts and a model in the container `clips`."""
    adlfs = pytest.importorskip("adlfs")
    folder = tmp_path_factory.mktemp("azure")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    words += ["--blobPort", str(port), "--location", str(folder / "azurite")]
    with subprocess.Popen([str(AZURITE), *words]) as server:
        try:
            for _ in range(600):
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.1)
            store = adlfs.AzureBlobFileSystem(connection_string=connection(port), skip_instance_cache=True)
            store.mkdir("clips")
            for number, name in enumerate(("walk.mp4", "run.mp4")):
                store.pipe(f"clips/in/{name}", clip(folder / name, number).read_bytes())
            store.pipe("clips/prompts.txt", b"a red star\n")
            store.put(f"{model()}/", "clips/model/", recursive=True)
            yield port
        finally:
            server.terminate()


def emt(folder: Path, connection: str, *arguments: object) -> Ended:
    variables = environment(folder) | {"AZURE_STORAGE_CONNECTION_STRING": connection}
    return Run(*map(str, arguments), folder=folder, environment=variables).end(240)


def states(ended: Ended) -> dict[str, int]:
    return dict(Counter(line["state"] for line in lines(ended)))


def test_an_output_folder_is_continued_by_another_machine(port, tmp_path):
    given = [f"{ROOT}/in/*.mp4", "--prompts", f"{ROOT}/prompts.txt", "--model", f"{ROOT}/model", "-o", f"{ROOT}/out"]
    given += ["--device", "cpu", "--cache-dir", f"{ROOT}/cache", "--json"]
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    made = emt(one, connection(port), "transfer", *given)
    assert states(made) == {"done": 2}, made.err
    assert {line["output"].split("_")[0] for line in lines(made)} == {"walk", "run"}
    again = emt(other, connection(port), "transfer", *given, "--seeds", "0-1")
    assert states(again) == {"skipped": 2, "done": 2}, again.err
    reported = emt(other, connection(port), "report", f"{ROOT}/out")
    assert (reported.code, reported.out.strip()) == (0, f"{ROOT}/out/report.html"), reported.err


@pytest.mark.parametrize(
    ("url", "key", "told"),
    [
        (f"{ROOT}/in/none.mp4", KEY, "none.mp4 does not exist"),
        ("az://nowhere/x.mp4", KEY, "x.mp4 does not exist"),
        (f"{ROOT}/in/walk.mp4", "A" + KEY[1:], "access is denied"),
    ],
)
def test_what_is_not_there_or_denied_is_one_line(port, tmp_path, url, key, told):
    words = ["--prompt", "x", "--model", model(), "--device", "cpu"]
    ended = emt(tmp_path, connection(port, key), "transfer", url, *words)
    assert ended.code == 1
    assert told in ended.err
    assert "Traceback" not in ended.err
