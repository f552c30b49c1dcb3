"""The documents: what they link to and name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Documents of the project, of which an installed demo model's card is one.
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "recipes/*.md", "examples/*.md", "emt/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
#: Names that stand for any, in instructions to contributors, and folders of a user's cache.
PLACEHOLDERS = re.compile(r"NAME|^emt/(downloads|outputs)$")


def anchor(heading: str) -> str:
    """The anchor of a heading as GitHub makes it: lower case, without punctuation, spaces as hyphens."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    """Files and headings of this repository; addresses elsewhere are not asked."""
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: no such file"
        assert not heading or heading in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_folders_that_are_named_are_there(document):
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    for named in re.findall(rf"`((?:{folders})/[\w./-]+)`", document.read_text(encoding="utf-8")):
        assert PLACEHOLDERS.search(named) or (ROOT / named).exists(), named


def test_an_anchor_is_githubs():
    assert anchor("More frames than the network takes") == "more-frames-than-the-network-takes"
    assert anchor("Samplers: `--scheduler`") == "samplers---scheduler"
    assert anchor("[0.1.0](https://example.org) – 2026") == "010--2026"
