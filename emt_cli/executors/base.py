"""Executors: run the jobs of an output folder, with one or more workers, and say how that ended."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from emt_cli.batch.feeder import Feeder
from emt_cli.batch.finisher import Finisher
from emt_cli.batch.jobs import Item
from emt_cli.batch.journal import Journal
from emt_cli.batch.outcomes import Listener, Outcomes
from emt_cli.batch.session import RunOptions, Session
from emt_cli.batch.worker import Worker


@dataclass
class Summary:
    """End of a run.

    Attributes:
        counts: Jobs by state.
        interrupted: A signal ended it.
    """

    counts: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False

    def exit_code(self, *, gone: bool = False, undelivered: bool = False) -> int:
        """0 all done, 1 some failed, 130 interrupted.

        Args:
            gone: The reader of results has gone, which ends a run quietly.
            undelivered: Results could not be written.
        """
        if self.interrupted:
            return 130
        return int(not gone and (undelivered or self.counts["failed"] > 0))


class Executor(Protocol):
    """Starts workers over the jobs of one output folder."""

    def run(self, items: Iterable[Item]) -> Summary:
        """Do all jobs.

        Raises:
            EmtError: nothing can be done at all (no such device, the model cannot be opened).
        """


@dataclass(frozen=True)
class Pieces:
    """Pieces of the batch runtime in one process on one device.

    Attributes:
        outcomes: Writes down how jobs end.
        feeder: Finds out which are to be done.
        worker: Makes their clips.
        finisher: Writes them.
    """

    outcomes: Outcomes
    feeder: Feeder
    worker: Worker
    finisher: Finisher

    @classmethod
    def assemble(cls, session: Session, journal: Journal, listener: Listener, options: RunOptions) -> Pieces:
        """Put them together."""
        outcomes = Outcomes(journal, listener)
        finisher = Finisher(session, outcomes, options)
        worker = Worker(session, outcomes, finisher, options)
        return cls(outcomes, Feeder(session, outcomes, options), worker, finisher)


def remove_leftovers(out: Path) -> None:
    """Remove what dead processes left half-written."""
    from emt.storage import remove_partials

    for folder in [out, *(Path(entry.path) for entry in os.scandir(out) if entry.is_dir(follow_symlinks=False))]:
        remove_partials(folder)
