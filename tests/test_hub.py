"""Sources from a model hub: addresses, what is fetched of a repository, and how it is read without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_hub import Hub
from safetensors.torch import save_file
from weight_files import Files, Imported, assert_same_weights, diffusers_folder, ldm_file, motion_adapter

from emt import EmtError
from emt.backbones.sd15.motion_checkpoint import read_motion_module
from emt.backbones.sd15.published import PUBLISHED
from emt.backbones.sd15.stable_diffusion import read_base
from emt.hub import HubPath, expect_there, locate, megabytes, parse_hub

# ------------------------------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("hf://a/b", HubPath("a/b")),
        ("hf://a/b/", HubPath("a/b")),
        ("hf://a-1/b_2.x/c d.ckpt", HubPath("a-1/b_2.x", "c d.ckpt")),
        ("hf://a/b/c/d.safetensors", HubPath("a/b", "c/d.safetensors")),
        ("hf://a/b@v1.0/c.ckpt", HubPath("a/b", "c.ckpt", "v1.0")),
        ("hf://models/a/b/c.ckpt", HubPath("a/b", "c.ckpt")),
        (Path("hf://a/b/c.ckpt"), HubPath("a/b", "c.ckpt")),
        ("a/b", None),
        ("hf", None),
    ],
)
def test_addresses(given: Any, place: HubPath | None) -> None:
    assert parse_hub(given) == place


@pytest.mark.parametrize(
    "given", ["hf://", "hf://a", "hf://a/b/../c", "hf://../b/c", "hf://a b/c", "hf://./b", "hf://a/.."]
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(EmtError, match="is no address on the hub"):
        parse_hub(given)


def test_progress_in_megabytes() -> None:
    assert megabytes(812_000_000, 1_674_000_000) == "812 of 1,674 MB"
    assert megabytes(3_000_000, 0) == "3 MB"


# ------------------------------------------------------------------------------------------ what is fetched, in-process


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(tmp_path / "hub")
    with hub.serve():
        use(hub, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_file_is_fetched_once_and_read_offline_from_then_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("guoyww/animatediff", **{"v3_sd15_mm.ckpt": b"weights", "mm_sd_v15.ckpt": b"other"})
    calls = []
    for _ in range(2):
        path = locate("hf://guoyww/animatediff/v3_sd15_mm.ckpt", "motion module", on_fetch=lambda *x: calls.append(x))
        assert path.read_bytes() == b"weights"
    assert hub.fetched() == ["v3_sd15_mm.ckpt"]
    assert calls == [("v3_sd15_mm.ckpt", 7, 7)]
    offline(monkeypatch)
    assert locate("hf://guoyww/animatediff/v3_sd15_mm.ckpt", "motion module") == path
    with pytest.raises(EmtError, match=r"mm_sd_v15\.ckpt cannot be fetched from the hub: it is not in the cache"):
        locate("hf://guoyww/animatediff/mm_sd_v15.ckpt", "motion module")


def test_a_repository_with_one_file_of_weights_stands_for_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("yfcai/EfficientMT", **{"checkpoint.ckpt": b"adapter", "README.md": b"text"})
    assert locate("hf://yfcai/EfficientMT", "adapter").read_bytes() == b"adapter"
    hub.add("a/styles", **{"x.safetensors": b"x", "x.ckpt": b"the same", "y.pt": b"y"})
    with pytest.raises(EmtError, match=r"holds 2 files of weights: x\.safetensors, y\.pt\nName one: hf://a/styles/x"):
        locate("hf://a/styles", "LoRA")
    (hub.folder / "a/styles/y.pt").unlink()
    assert locate("hf://a/styles", "LoRA").read_bytes() == b"x"
    offline(monkeypatch)
    assert locate("hf://yfcai/EfficientMT", "adapter").read_bytes() == b"adapter"


def test_of_a_repository_with_everything_only_what_is_read_is_fetched(
    hub: Hub, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stable Diffusion's own repository has the same weights five times."""
    folder = diffusers_folder(hub.folder / "sd/v1-5", files.base)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    more = ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.ckpt")
    for name in (*more, "safety_checker/model.safetensors", "README.md"):
        hub.add("sd/v1-5", **{name.replace("/", "__"): weights})
    hub.add("sd/v1-5", model_index__json=b"{}")
    model = read_base("hf://sd/v1-5")
    assert_same_weights(model.unet.state, files.base.unet)
    assert sum("unet" in name for name in hub.fetched()) == 2
    assert not [name for name in hub.fetched() if "pruned" in name or "safety" in name or "README" in name]
    assert (model.folder / "tokenizer" / "tokenizer.json").is_file()
    count = len(hub.fetched())
    offline(monkeypatch)
    assert_same_weights(read_base("sd/v1-5").unet.state, files.base.unet)  # a bare hub id is the same
    assert len(hub.fetched()) == count


def test_a_motion_adapter_and_a_single_file_are_distinguished(hub: Hub, files: Files) -> None:
    motion_adapter(files.motion, mid=False).save_pretrained(hub.folder / "a/adapter")
    hub.add("a/adapter", **{"other.ckpt": b"not this"})
    assert_same_weights(read_motion_module("hf://a/adapter")[0].state, files.motion)
    hub.add("a/files", **{"mm.ckpt": files.motion_ckpt})
    assert_same_weights(read_motion_module("hf://a/files")[0].state, files.motion)
    motion_adapter(files.motion, mid=False).save_pretrained(hub.folder / "a/many/motion/one")
    part, origin = read_motion_module("hf://a/many/motion/one")
    assert_same_weights(part.state, files.motion)
    assert origin.name == "hf://a/many/motion/one"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hf://no/body/x.ckpt", "there is no such repository, or it is private"),
        ("hf://no/body", "there is no such repository, or it is private"),
        ("hf://a/b/x.ckpt", "there is no such file in the repository"),
        ("hf://a/b/folder", "has no folder"),
        ("hf://a/empty", "holds no files of weights"),
        ("hf://terms/first/x.ckpt", "its terms must be accepted on its page"),
    ],
)
def test_what_the_hub_does_not_have_is_one_message(given: str, message: str, hub: Hub) -> None:
    hub.add("a/b", y__txt=b"")
    hub.add("a/empty", **{"README.md": b""})
    hub.add("terms/first", **{"x.ckpt": b""})
    hub.gated.add("terms/first")
    with pytest.raises(EmtError, match=message) as caught:
        locate(given, "LoRA")
    assert given in caught.value.problem
    assert len(str(caught.value).splitlines()) == 2


def test_a_hub_that_is_gone_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    hub.url = "http://127.0.0.1:9"  # nothing listens there
    use(hub, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(EmtError, match="the base hf://a/b cannot be fetched from the hub"):
        locate("hf://a/b", "base")


def test_a_name_from_the_hub_cannot_leave_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    hub.add("a/b", **{"x.ckpt": b"x"})

    names = ("../../evil.ckpt", "/evil.ckpt", "x.ckpt")
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
    assert locate("hf://a/b", "LoRA").read_bytes() == b"x"


# --------------------------------------------------------------------------------------------------------- the program


def test_the_published_set_is_fetched_imported_and_offline_from_then_on(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub")
    addresses = {file.option: parse_hub(file.address) for file in PUBLISHED}
    diffusers_folder(hub.folder / addresses["base"].repo, files.base)
    save_file(ldm_file(files.other), tmp_path / "style.safetensors")
    contents = {"motion_module": files.motion_ckpt, "adapter": files.adapter_ckpt}
    for option, content in (contents | {"dreambooth": tmp_path / "style.safetensors"}).items():
        hub.add(addresses[option].repo, **{addresses[option].path: content})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path / "home")}
    command = [str(Path(sys.executable).with_name("emt")), "import-weights", "--published", "--dtype", "fp32", "-o"]
    with hub.serve():
        result = subprocess.run(
            [*command, str(tmp_path / "m")],
            env=environment | {"HF_ENDPOINT": hub.url},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'm'}\n"
    model = Imported(tmp_path / "m")
    assert_same_weights(model.weights, files.weights(unet=files.other.unet))
    for file in PUBLISHED:
        assert f"`{file.address}`" in model.card
    use(hub, monkeypatch)  # which is gone by now
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    again = files.run(tmp_path / "again", **{file.option: file.address for file in PUBLISHED}, tokenizer=None)
    assert_same_weights(again.weights, model.weights)


def test_the_help_says_where_the_published_files_are_and_under_which_licences() -> None:
    command = [str(Path(sys.executable).with_name("emt")), "import-weights", "--help"]
    text = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"}
    ).stdout
    words = re.sub(r"\s+", " ", text)
    for file in PUBLISHED:
        assert file.address in words
        assert file.licence in words
        assert file.elsewhere in words
    assert "No file of the authors was opened" in words


def test_base_and_motion_module_are_required() -> None:
    command = [str(Path(sys.executable).with_name("emt")), "import-weights", "--base", "x", "-o", "y"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--motion-module missing" in result.stderr
    assert "--published" in result.stderr


@pytest.mark.parametrize(
    ("given", "folder", "there"),
    [
        ("nope", True, False),
        ("owner/name", True, True),
        ("owner/name", False, False),
        ("owner/name.safetensors", True, False),
        ("hf://owner/name/file.ckpt", False, True),
        (".", False, True),
    ],
)
def test_k7_what_is_not_there_is_known_without_a_library(given, folder, there):
    """`emt import-weights` asks before it imports any."""
    if there:
        expect_there(given, "adapter", folder)
        return
    with pytest.raises(EmtError, match=f"the adapter {given} does not exist"):
        expect_there(given, "adapter", folder)
