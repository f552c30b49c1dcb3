"""Which jobs are to be done: those that are not done, cannot be done or come twice are reported at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from emt.errors import EmtError
from emt.remote import Downloads
from emt.storage import write_atomically
from emt_cli.batch.best_of import check_tracking
from emt_cli.batch.generator import describe
from emt_cli.batch.jobs import Item, Job, Rejected, identify, output_name
from emt_cli.batch.outcomes import Outcomes
from emt_cli.batch.records import dumps
from emt_cli.batch.results import Place, find_place, read_record, sidecar, state_on_disk
from emt_cli.batch.session import RunOptions, Session
from emt_cli.batch.tasks import Reference, Task

_FRESH = 1.0  # seconds


class Feeder:
    """Turns items into tasks, in order; needs no torch.

    Args:
        session: Knows what the model can make, and the content of references.
        outcomes: Takes what ends here.
        options: Of the run.
    """

    def __init__(self, session: Session, outcomes: Outcomes, options: RunOptions) -> None:
        self.generator, self.index = session.generator, session.index
        self.outcomes, self.options = outcomes, options
        self._downloads = Downloads(outcomes.listener.say)
        self._hashed: tuple[Path | None, str, float] = (None, "", 0.0)
        self._seen: dict[str, tuple[str, str]] = {}  # by name: identity, and where its clip goes

    def tasks(self, items: Iterable[Item]) -> Iterator[Task | None]:
        """The tasks of items; consecutive ones with the same sampling of the same content, and one
        method, share a reference.

        Yields:
            A task; or None where the next item is yet to come.
        """
        group: tuple[Any, ...] = ()
        reference: Reference | None = None
        for item in items:
            if item is None:
                yield None
            elif isinstance(item, Rejected):
                known = {"reference": item.reference, "prompt": item.prompt, "origin": item.origin}
                self.outcomes.failed(
                    {"event": "job", **{key: value for key, value in known.items() if value}}, item.error
                )
            elif task := self._task(item):
                if reference is None or task.key != group:
                    group, reference = task.key, task.reference
                task.reference = reference
                self.outcomes.expect(task.output)
                yield task

    def recover(self, task: Task) -> bool:
        """Return whether the worker of a task had written its clip when it died; the clip is done then."""
        clip, store = self.outcomes.out / task.output, self.outcomes.journal.known.store
        state = "open"
        if store is None:
            state = state_on_disk(None, clip, task.job, task.identity)
        else:
            with suppress(EmtError):  # then it is made again
                store.look_again(task.output)
                state, _ = store.state(None, task.output, task.job, task.identity)
        if state != "made":
            return False
        self._adopt(task.line, clip, report=True)
        return True

    def _task(self, job: Job) -> Task | None:
        """The task of a job, or None if it is already done, a duplicate, or invalid (then reported)."""
        line = {"event": "job", **describe(job)}
        try:
            if job.source:
                job = replace(job, reference=self._downloads.fetch(job.source))
            sha256 = line["reference_sha256"] = self._hash(job.reference)
            job = replace(job, reading=self.generator.model.reading(job.prompt, job.settings.as_dict()))
            self.generator.check(job)
            job = replace(job, addons=self.generator.addons.find(job.settings))
            how = {"precision": self.options.numerics, "method": self.options.method}
            identity = identify(job, reference=sha256, model=self.generator.model_sha256, **how)
            output = output_name(job, sha256)
            line |= {"id": identity, "output": output}
            first, there = self._seen.get(output, ("", output))
            if first == identity:
                self.outcomes.duplicate({**line, "output": there})
                return None
            if first:
                raise EmtError(f"another job of this run makes {output} too", "Give one of them another seed.")
            self._seen[output] = identity, output
            check_tracking(job)
            journal = self.outcomes.journal
            place = find_place(self.outcomes.out, journal.known, job, output, identity, self.options.overwrite)
            self._seen[output] = identity, place.output
            line["output"] = place.output
            if self._ended_before(line, place):
                return None
            return Task(job, identity, place.output, Reference(job, sha256))
        except Exception as error:  # whatever is wrong with one job leaves the others
            self.outcomes.failed(line, self.generator.explain(error, job))
        return None

    def _hash(self, reference: Path) -> str:
        """Hash of a reference's content; for consecutive jobs of the same one it is looked at once in `_FRESH` s."""
        path, sha256, when = self._hashed
        if path != reference or time.monotonic() - when > _FRESH:
            sha256 = self.index.sha256(reference)
            self._hashed = reference, sha256, time.monotonic()
        return sha256

    def _ended_before(self, line: dict[str, Any], place: Place) -> bool:
        """Return whether earlier runs leave nothing to do for a job, which is reported then.

        Args:
            line: The job as journal lines describe it.
            place: Where its clip is or goes.
        """
        if self.options.overwrite:
            return False
        known, state = self.outcomes.journal.known, place.state
        if state == "made":
            self._adopt(line, self.outcomes.out / place.output)
        if self.options.filter and (reason := self._fails_filter(line, state)):
            if state == "open":
                self.outcomes.unchanged(line, "dropped", reason)
            else:
                self.outcomes.dropped({**line, **known.done[line["output"]]}, reason)
            return True
        if state == "open":
            return False
        made = known.done[line["output"]]
        if place.looked and state == "done":
            self.outcomes.seen(line, place.looked)
        self.outcomes.moved(line, made.get("reference"))
        self.outcomes.unchanged(
            {**line, **{key: made[key] for key in ("seed", "best_of") if "best_of" in made}}, "skipped"
        )
        return True

    def _adopt(self, line: dict[str, Any], clip: Path, report: bool = False) -> None:
        """Write down what a process had made when it was killed."""
        record = read_record(clip)
        write_atomically(sidecar(clip), dumps(record) + b"\n")
        self.outcomes.done({**line, **record, "adopted": True}, report=report)

    def _fails_filter(self, line: dict[str, Any], state: str) -> str:
        """Reason why a job of an earlier run does not pass this run's filter, by its measures; empty if it may."""
        assert self.options.filter is not None
        journal = self.outcomes.journal.known
        known = (journal.dropped if state == "open" else journal.done).get(line["output"], {})
        if known.get("id") != line["id"] or not {"motion_fidelity", "temporal_consistency"} <= known.keys():
            return ""
        return self.options.filter.reason(known["motion_fidelity"], known["temporal_consistency"])
