"""`--size` by name: shapes that are left to the model and to each reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from emt.cache import ContentIndex
from emt.errors import EmtError
from emt.model_folder import find_model
from emt.video import write_clip
from emt_cli.batch.inputs import expand
from emt_cli.batch.inputs.shapes import ASPECTS, Shapes, size_of
from emt_cli.batch.jobs import Job, Rejected, identify
from emt_cli.batch.options import TransferOptions, UsageError, parse_field


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide and a tall clip, a square folder of pictures, and what is no clip."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, (width, height) in {"tall.mp4": (36, 96), "wide.mp4": (64, 48), "square": (20, 20)}.items():
        write_clip(folder / name, np.zeros((3, height, width, 3), np.uint8), 8)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def listed(tmp_path: Path, *references: Path, **options: object) -> list[Job | Rejected]:
    model = find_model(None, download=False)
    given = TransferOptions([str(path) for path in references], **options)  # type: ignore[arg-type]
    given.check()
    return expand(given, model.defaults, shapes=Shapes(model, ContentIndex(tmp_path / "cache")))[0]


def sizes(jobs: list[Job | Rejected]) -> list[tuple[str, int, int]]:
    return [(job.reference.name, job.settings.width, job.settings.height) for job in jobs if isinstance(job, Job)]


@pytest.mark.parametrize(
    ("aspect", "side", "multiple", "expected"),
    [
        (1, 512, 8, (512, 512)),
        (ASPECTS["landscape"], 512, 8, (680, 384)),
        (ASPECTS["portrait"], 512, 8, (384, 680)),
        (ASPECTS["landscape"], 480, 16, (640, 352)),
        (ASPECTS["landscape"], 128, 8, (168, 96)),
        (4 / 3, 512, 8, (592, 440)),
        (1000, 512, 8, (4096, 16)),
        (1 / 1000, 512, 16, (16, 4096)),
        (1e6, 32, 8, (4096, 8)),
    ],
)
def test_a_named_size_has_the_models_area_and_multiple(aspect, side, multiple, expected):
    assert size_of(aspect, side * side, multiple) == expected


@pytest.mark.parametrize("text", ["768x432", " 768X432 ", "portrait", "Landscape", "reference"])
def test_sizes_are_written_as_people_write_them(text):
    assert parse_field("size", text) == text.strip().lower()


@pytest.mark.parametrize(
    "text", ["768", "x", "768x", "768x432x3", "770x432", "8192x8", "0x8", "-8x8", "wide", "", 3, True]
)
def test_other_sizes_are_refused_with_those_that_are_allowed(text):
    with pytest.raises(EmtError, match=r"size|width|height"):
        parse_field("size", text)


def test_a_size_is_its_width_and_height(clips, tmp_path):
    named = listed(tmp_path, clips / "tall.mp4", prompt=["a red star"], settings={"size": "168x96"})
    plain = listed(tmp_path, clips / "tall.mp4", prompt=["a red star"], settings={"width": 168, "height": 96})
    wide = listed(tmp_path, clips / "tall.mp4", prompt=["a red star"], settings={"size": "landscape"})
    assert sizes(named) == sizes(plain) == sizes(wide) == [("tall.mp4", 168, 96)]
    ids = {identify(job, reference="r", model="m", precision="auto") for job in (*named, *plain, *wide)}
    assert len(ids) == 1, "what was made by numbers is not made again by name"


def test_each_reference_has_its_own_size(clips, tmp_path):
    jobs = listed(tmp_path, clips, clips / "square", prompt=["a red star"], settings={"size": "reference"})
    assert sorted(sizes(jobs)) == [("square", 128, 128), ("tall.mp4", 80, 208), ("wide.mp4", 144, 112)]
    (broken,) = (job for job in jobs if isinstance(job, Rejected))
    assert broken.reference.endswith("broken.mp4"), "it fails alone"


def test_a_lines_own_size_wins_over_the_command_lines(clips, tmp_path):
    rows = [
        {"prompt": "a red star"},
        {"prompt": "a red car", "size": "portrait"},
        {"prompt": "a red cat", "size": "reference"},
        {"prompt": "a red dog", "width": 64},
        {"prompt": "a red fox", "size": "portrait", "height": 64},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = {"prompts": [tmp_path / "jobs.jsonl"]}
    jobs = listed(tmp_path, clips / "wide.mp4", settings={"size": "landscape"}, **prompts)
    found = {job.prompt: (job.settings.width, job.settings.height) for job in jobs if isinstance(job, Job)}
    assert found == {
        "a red star": (168, 96),
        "a red car": (96, 168),
        "a red cat": (144, 112),
        "a red dog": (64, 96),
    }
    (rejected,) = (job for job in jobs if isinstance(job, Rejected))
    assert "size and height exclude each other" in rejected.error.problem
    with pytest.raises(UsageError, match="size and width"):
        listed(tmp_path, clips / "wide.mp4", settings={"size": "landscape", "width": 64})
