"""Output folders in object stores, for who reads all of their clips: reports and measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from emt.errors import EmtError
from emt.remote import Announcer, child, fetch, fetched, is_url, normal, shown, to_path
from emt_cli.batch import journal
from emt_cli.batch.published import Published
from emt_cli.report.gallery import FOLDER
from emt_cli.report.page import FILE_NAME, write_report


class Folder:
    """An output folder of a command line, on disk with all of its finished clips; behind a URL, a copy of it.

    Args:
        given: The folder, as the user named it.
        say: Called with lines for people.
        references: Fetch the references that its journal names by URL and that are not on this machine.

    Attributes:
        path: The folder on disk.
        published: Where it is, if that is a store; else None.

    Raises:
        EmtError: it is in a store, which cannot be read.
    """

    def __init__(self, given: Path, say: Callable[[str], None], references: bool = False) -> None:
        self.published = Published(given, say) if is_url(given) else None
        self.path = self.published.folder if self.published else to_path(given)
        if self.published:
            if not journal.exists(self.path):
                raise EmtError(f"{self.published} has no journal", "Give the --out of an `emt transfer`.")
            lines = journal.current(self.path)
            self.published.fetch(line["output"] for line in lines if line["state"] == "done")
            self.published.fetch_tree(FOLDER)
        if references and self.path.is_dir():
            _fetch([url for url in _references(self.path) if fetched(url) is None], say)

    def publish(self, *names: str) -> list[str]:
        """Put files of the folder where it is; returns where they are now.

        Raises:
            EmtError: one cannot be put.
        """
        if self.published is None:
            return [str(self.path / name) for name in names]
        self.published.publish(*names)
        return [shown(child(self.published.url, name)) for name in names]


def _references(folder: Path) -> list[str]:
    """URLs of the references that a journal names."""
    named = dict.fromkeys(line.get("reference", "") for line in journal.current(folder))
    return [normal(name) for name in named if is_url(name)]


def _fetch(urls: Sequence[str], say: Callable[[str], None]) -> None:
    """Fetch references; one that cannot be is reported."""
    for url in urls:
        try:
            fetch(url, Announcer(say))
        except EmtError as error:
            say(f"note: {error.problem}")


def publish_report(
    outs: Sequence[Path],
    say: Callable[[str], None],
    output: Path | None = None,
    compare: Path | None = None,
    references: bool = False,
) -> str:
    """Write the page of output folders (`emt_cli.report.page.write_report`), on disk or in a store.

    Args:
        outs: The folders, which are shown as one. In a store, the first one gets the page and what it refers to.
        say: Called with lines for people.
        output: The page on disk; None for `report.html` in the first folder.
        compare: Another output folder, whose results are beside those of the same reference, prompt and seed.
        references: Fetch references that journals name by URL.

    Returns:
        Where the page is.

    Raises:
        EmtError: a folder has no journal or cannot be read, or the page cannot be written.
    """
    out, *others = (Folder(given, say, references) for given in outs)
    beside = Folder(compare, say, references).path if compare is not None else None
    apart = [folder for folder in (*others, *([compare] if compare else [])) if out.published and folder is not None]
    if apart and output is None:
        raise EmtError(
            f"a page in {out.published} cannot refer to clips of another output folder",
            "Write it on this machine: -o report.html",
        )
    page = write_report(out.path, output, beside, [folder.path for folder in others])
    if out.published is None or output is not None:
        return str(page)
    out.published.publish_tree(FOLDER)
    return out.publish(FILE_NAME)[0]
