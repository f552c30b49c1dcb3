"""Runs jobs in this process, on one device: its threads, its signals, and the end of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from emt_cli.batch.jobs import Item
from emt_cli.batch.journal import Journal
from emt_cli.batch.outcomes import Listener
from emt_cli.batch.phases import process_age
from emt_cli.batch.session import RunOptions, Session
from emt_cli.executors.base import Pieces, Summary, remove_leftovers
from emt_cli.executors.interrupts import Interrupts


class LocalExecutor:
    """One run over an output folder in this process, whose main thread uses the device.

    Args:
        session: The model on its device.
        journal: The folder's journal, locked for this process.
        listener: Called with the progress.
        options: Of the run.
    """

    def __init__(self, session: Session, journal: Journal, listener: Listener, options: RunOptions) -> None:
        self.generator, self.filters = session.generator, options.filter is not None
        self.journal, self.listener = journal, listener
        self.pieces = Pieces.assemble(session, journal, listener, options)
        self._working = False

    def run(self, items: Iterable[Item]) -> Summary:
        """Do all jobs. SIGINT and SIGTERM finish the running batch; a second one ends the process at once.

        Raises:
            EmtError: nothing can be done at all (no such device, the model cannot be opened).
        """
        outcomes, worker, finisher = self.pieces.outcomes, self.pieces.worker, self.pieces.finisher
        summary = Summary(outcomes.counts)
        remove_leftovers(self.journal.out)
        with Interrupts(lambda: self._working and worker.idle, self._stop, self._abandon) as interrupts:
            finisher.start()
            try:
                self._working = True
                worker.run(self.pieces.feeder.tasks(items))
            except (KeyboardInterrupt, Exception):
                if not interrupts.came:  # libraries that are interrupted while they are imported raise errors of theirs
                    raise
            finally:
                self._working = False
                outcomes.stop()
                with worker.phases("finishing"):
                    finisher.join()
            summary.interrupted = interrupts.came
            self._end(interrupts.came)
        return summary

    def _end(self, interrupted: bool) -> None:
        worker, seconds, facts = self.pieces.worker, process_age(), dict[str, Any]()
        if worker.device_wait is not None:
            facts |= {"device": self.generator.device.name, "device_wait": round(worker.device_wait, 4)}
            facts |= {"device_busy": round(min(1.0, self.generator.busy_seconds / seconds), 4)}
        self.pieces.outcomes.end(worker.phases, seconds, facts, interrupted=interrupted, filters=self.filters)

    def _stop(self) -> None:
        self.pieces.outcomes.stop()
        self.listener.hurry()
        if not self.pieces.worker.idle:
            self.listener.say("finishing the running batch; interrupt again to stop at once")

    def _abandon(self) -> None:
        self.listener.abandon()
        self.journal.close()  # after a line that is being written
