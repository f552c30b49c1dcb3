"""Making of model folders from published files, whatever the network: progress, sources and the model's card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emt.checkpoints import Source
from emt.hub import megabytes
from emt.model_folder import model_card

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


@dataclass(frozen=True)
class ImportReport:
    """Folder that an import wrote, and its sources."""

    folder: Path
    sources: tuple[Source, ...]


@dataclass
class Steps:
    """Progress of an import: steps done of all, and what is being fetched within one."""

    report: Progress | None
    total: int
    done: int = 0

    def __call__(self, what: str) -> None:
        """Report the next step."""
        if self.report:
            self.report(what, self.done, self.total)
        self.done += 1

    def fetching(self, name: str, done: int, total: int) -> None:
        """Report a file that is being fetched, in bytes."""
        if self.report:
            self.report(f"Fetching {name}, {megabytes(done, total)}", self.done - 1, self.total)

    def end(self) -> None:
        """Report that all is done."""
        if self.report:
            self.report("Done", self.total, self.total)


def import_card(model: str, sources: Sequence[Source], dtype: str) -> str:
    """README.md of an imported model folder: where each part came from, with the hashes of its files."""
    lines = [
        f"{model}, stored as {dtype} by `emt import-weights`. The weights keep the licences of their sources.",
        "",
        "## Sources",
        "",
    ]
    for source in sources:
        lines.append(f"- **{source.kind}** `{source.name}`: {source.note}.")
        lines += [f"  - `{path}` sha256 `{digest}`" for path, digest in source.files]
        if source.dropped:
            lines.append(f"  - not read, as nothing here uses it: {_listed(source.dropped)}")
    return model_card("Motion transfer model", "\n".join(lines))


def _listed(names: Sequence[str]) -> str:
    """Names of keys for a card; what is many under one beginning is counted."""
    beginnings = Counter(name.split(".")[0] for name in names)
    many = {beginning for beginning, count in beginnings.items() if count > 40}
    listed = [f"`{beginning}.*` ({beginnings[beginning]})" for beginning in sorted(many)]
    listed += [f"`{name}`" for name in sorted(names) if name.split(".")[0] not in many]
    return ", ".join(listed)
