"""Choice of the executor: this process and one device, or many workers (`--gpus`, `--workers`, `--ray`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from emt.remote import is_url
from emt_cli.batch.journal import Journal
from emt_cli.batch.options import TransferOptions, parse_gpus
from emt_cli.batch.outcomes import Listener
from emt_cli.batch.session import RunOptions, Session, SessionOptions
from emt_cli.executors.base import Executor

if TYPE_CHECKING:
    from emt_cli.executors.ray import LocalRay, RayCluster


def _is_shared(options: TransferOptions) -> bool:
    """Return whether many workers are to share the jobs."""
    return bool(options.gpus or options.workers or options.ray)


def _place(options: TransferOptions) -> LocalRay | RayCluster:
    """The Ray in which the workers of a command line run, not opened yet.

    Raises:
        EmtError: what they need is not installed, or there are not as many GPUs.
    """
    from emt_cli.executors.gpus import choose_gpus
    from emt_cli.executors.ray import LocalRay, RayCluster, check_ray

    check_ray("--ray" if options.ray else "--gpus" if options.gpus else "--workers")
    on_gpus = options.device != "cpu"
    gpus = parse_gpus(options.gpus) if options.gpus else None
    if options.ray:
        return RayCluster(options.ray, gpus if isinstance(gpus, int) else options.workers, on_gpus)
    named = choose_gpus(options.gpus) if on_gpus else []
    return LocalRay(len(named) or options.workers or 1, named)


def count_workers(options: TransferOptions) -> int:
    """Number of workers that a command line starts; 0 for all of a cluster.

    Raises:
        EmtError: what they need is not installed, or there are not as many GPUs.
    """
    return _place(options).size if _is_shared(options) else 1


def choose_executor(
    options: TransferOptions, session_options: SessionOptions
) -> Callable[[Session, Journal, Listener, RunOptions], Executor]:
    """The executor of a command line, to be made of the session, the journal, the listener and the run's options.

    Raises:
        EmtError: what many workers need is not installed, or there are not as many GPUs.
    """
    if not _is_shared(options):
        from emt_cli.executors.local import LocalExecutor

        return LocalExecutor
    place = _place(options)

    def make(session: Session, journal: Journal, listener: Listener, run: RunOptions) -> Executor:
        from emt_cli.executors.fleet import FleetExecutor, worker_name
        from emt_cli.executors.ray import RayFleet
        from emt_cli.executors.worker import WorkerOptions

        writer = journal.writer
        base = WorkerOptions(
            session_options,
            "cpu" if options.device == "cpu" else "cuda",
            run,
            options.out if is_url(options.out) else options.out.absolute(),
            "",
            tuple(session.generator.prompts),
            Path.cwd(),
        )
        fleet = RayFleet(place, lambda number: replace(base, writer=worker_name(writer, number)))
        return FleetExecutor(session, journal, listener, run, fleet, writer)

    return make
