"""Workers as actors of Ray: of a Ray of this run's own on this machine, or of a cluster that runs.

Nothing large goes through Ray: workers open the model by themselves, read references and write clips; jobs and journal
lines alone are sent. Ray's messages are for its developers, and are not shown; its logs are in a folder of their own,
which goes when the run ends.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from emt.errors import EmtError, first_line
from emt_cli.executors.fleet import Death
from emt_cli.executors.gpus import VISIBLE
from emt_cli.executors.worker import Order, RemoteWorker, Report, WorkerOptions

_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has the latter alone, which ends a process there at once
_REPORT = 0.5  # seconds that a worker waits for news
_CONNECT = 10.0  # seconds for the head of a cluster to take a connection
_STORE = 80 << 20  # bytes of Ray's object store, the fewest that it takes: what goes through it is small
_PREFIX = "emt-ray-"
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_THREADS = 4  # of an actor: a report that waits, and calls beside it
_LONGEST = 24  # characters of the folder for Ray's files: the paths of its sockets have a limit of 107


def check_ray(option: str) -> None:
    """Raise EmtError unless Ray is installed.

    Args:
        option: The option that needs it.
    """
    if importlib.util.find_spec("ray") is None:
        hint = "Install it: pip install 'emt-cli[ray]' (in a checkout: pip install '.[ray]')"
        raise EmtError(f"{option} needs Ray, which is not installed", hint)


#: Environment of a Ray of this run's own; what the user has set stays.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill workers where other programs fill the memory
    "RAY_AUTH_MODE": "token",  # nobody else on this machine may send work to it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # a worker is the program itself, not something beside it
}


class LocalRay:
    """A Ray of its own on this machine, for one run.

    Args:
        workers: Number of workers.
        gpus: GPUs for them, one each, as CUDA_VISIBLE_DEVICES names them; none for CPUs.
    """

    def __init__(self, workers: int, gpus: Sequence[str] = ()) -> None:
        self.size = workers
        self._gpus = list(gpus)
        self._folder: Path | None = None
        self._children: list[int] = []
        self.resources: dict[str, Any] = {"num_cpus": 1, **({"num_gpus": 1} if self._gpus else {})}

    def open(self) -> None:
        """Start it.

        Raises:
            EmtError: it does not start.
        """
        self._folder = _make_folder()
        before = set(_children())
        if self._gpus:
            os.environ[VISIBLE] = ",".join(self._gpus)
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Libraries use as many threads as an actor has CPUs, else; but Ray starts a process for each CPU that it has.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.size)))
        import ray  # not before: it reads its settings when it is imported

        try:
            ray.init(
                address="local",
                num_cpus=self.size,
                num_gpus=len(self._gpus),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=_STORE,
                _temp_dir=str(self._folder),
            )
        except Exception as error:
            raise EmtError(f"Ray does not start: {first_line(error)}", "Is there room in /tmp and /dev/shm?") from None
        self._children = [pid for pid in _children() if pid not in before]

    def check(self) -> None:
        """Raise EmtError if one of its processes has ended."""
        for pid in self._children:
            if not _is_alive(pid):
                raise EmtError("Ray has ended in the middle of the run", "Run again: what is done stays done.")

    def kill(self) -> None:
        """Kill its processes."""
        for pid in self._children:
            with suppress(OSError):
                os.kill(pid, _KILL)

    def close(self) -> None:
        """Remove what it has left."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


class RayCluster:
    """A cluster that runs, and stays.

    Args:
        address: auto, or the address of its head.
        workers: Number of workers; None for as many as it has GPUs, or CPUs.
        on_gpus: A GPU for each.
    """

    def __init__(self, address: str, workers: int | None, on_gpus: bool) -> None:
        self._address, self._on_gpus = address, on_gpus
        self.size = workers or 0
        self.resources: dict[str, Any] = {"num_cpus": 0 if on_gpus else 1, **({"num_gpus": 1} if on_gpus else {})}

    def open(self) -> None:
        """Connect to it.

        Raises:
            EmtError: there is none, or it has not as many GPUs or CPUs.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        try:
            _reach(self._address)
            ray.init(address=self._address, log_to_driver=False, configure_logging=False)
        except Exception as error:
            hint = "Start one with `ray start --head`, or use --gpus for those of this machine."
            where = "" if self._address == "auto" else f" at {self._address}"
            raise EmtError(f"there is no Ray cluster{where}: {first_line(error):.300}", hint) from None
        kind = "GPU" if self._on_gpus else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if there < max(1, self.size):
            needed = f"{self.size} were requested" if self.size else "one is needed at least"
            hint = "Use --gpus all, or --device cpu." if self._on_gpus else "Use fewer --workers."
            raise EmtError(f"the cluster has {there} {kind}s, {needed}", hint)
        self.size = self.size or there

    def check(self) -> None:
        """Nothing: its end shows in what Ray raises."""

    def kill(self) -> None:
        """Nothing: it is not this run's."""

    def close(self) -> None:
        """Nothing."""


class RayWorker(RemoteWorker):
    """A worker in a process of Ray's.

    When Ray ends a process, it kills the programs that it has started first: ffmpeg would fail then, and with it a job
    that has not. So the process goes at once, by the signals' own effect, and with its parent. It works in the command
    line's folder, where a node of a cluster would have it work in that of `ray start`.

    Args:
        options: Of the worker.
    """

    def __init__(self, options: WorkerOptions) -> None:
        with suppress(ValueError):  # not in another thread than the main one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with suppress(OSError, AttributeError):  # Linux alone has it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(_KILL))
        with suppress(OSError):  # a node of a cluster may not have it: what is named from it is not found there
            os.chdir(options.folder or ".")
        super().__init__(options)


class RayFleet:
    """The workers of a run as actors (a `emt_cli.executors.fleet.Fleet`).

    Args:
        place: Where they run.
        options: Options of a worker, by its number.
    """

    def __init__(self, place: LocalRay | RayCluster, options: Callable[[int], WorkerOptions]) -> None:
        self._place, self._options = place, options
        self._actors: dict[int, Any] = {}
        self._reports: dict[Any, int] = {}  # that are awaited, with whose they are
        self._pids: dict[int, int] = {}  # of workers on this machine
        self._quiet = _quiet()
        self._opened = False
        self._guard = threading.Lock()

    @property
    def size(self) -> int:
        """Number of workers; of a whole cluster, once it is opened."""
        return self._place.size

    def open(self) -> None:
        """Start Ray, or connect to it.

        Raises:
            EmtError: it cannot be reached, or has not as many GPUs.
        """
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        self._quiet.__enter__()
        self._opened = True
        self._place.open()
        import ray

        limits = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": _THREADS}
        actor: Any = ray.remote  # whose overloads know no dict of options
        self._class = actor(**limits, **self._place.resources)(RayWorker)

    def start(self, number: int) -> None:
        """Start a worker."""
        self._actors[number] = self._class.remote(self._options(number))
        self._ask(number)

    def _ask(self, number: int) -> None:
        self._reports[self._actors[number].report.remote(_REPORT)] = number

    def add(self, number: int, orders: list[Order]) -> None:
        """Give it jobs."""
        self._actors[number].add.remote(orders)

    def wait(self, seconds: float) -> list[tuple[int, Report | Death]]:
        """Reports and deaths since the last call.

        Raises:
            EmtError: Ray itself has ended.
        """
        import ray

        self._place.check()
        references = list(self._reports)
        if not references:
            threading.Event().wait(seconds)
            return []
        ready, rest = ray.wait(references, num_returns=1, timeout=seconds)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        found: list[tuple[int, Report | Death]] = []
        for reference in ready:
            number = self._reports.pop(reference)
            try:
                report: Report = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._place.check()
                self._pids.pop(number, None)
                found.append((number, Death(_reason(error))))
                continue
            if report.facts.get("host") == socket.gethostname():
                self._pids[number] = report.facts["pid"]
            if not report.ended:
                self._ask(number)
            found.append((number, report))
        return found

    def stop(self, number: int) -> None:
        """Let it end after its running batch."""
        self._actors[number].stop.remote()

    def close(self, number: int) -> None:
        """Let it end after what it has."""
        self._actors[number].close.remote()

    def remove(self, number: int) -> None:
        """Its process is not needed any more."""
        import ray

        for reference in [one for one, whose in self._reports.items() if whose == number]:
            del self._reports[reference]
        actor = self._actors.pop(number, None)
        self._pids.pop(number, None)
        if actor is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)

    def shutdown(self) -> None:
        """All have ended: end Ray too, or leave the cluster."""
        import ray

        if not self._opened:
            return
        self._opened = False
        for number in list(self._actors):
            self.remove(number)
        with suppress(Exception):
            ray.shutdown()
        self._place.kill()
        self._place.close()
        self._quiet.__exit__(None, None, None)

    def abandon(self) -> None:
        """Kill all at once."""
        for pid in list(self._pids.values()):
            with suppress(OSError):
                os.kill(pid, _KILL)
        self._place.kill()
        self._place.close()


def _reach(address: str) -> None:
    """Raise OSError if nothing listens at the address of a cluster's head, for which Ray would look for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
        with suppress(OSError):  # Ray says what it needs if there is none
            address = address or Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text()
    host, _, port = address.strip().rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT).close()
        except OSError as error:
            raise OSError(f"nothing answers at {host}:{port} ({error.strerror or first_line(error)})") from None


def _reason(error: Exception) -> str:
    """Reason why an actor has died, in a few words."""
    text = str(error)
    if "Unavailable" in type(error).__name__:
        return "it cannot be reached"
    if "OOM" in type(error).__name__ or "OutOfMemory" in type(error).__name__:
        return "out of memory"
    found = re.search(r"(?:because|cause:?) (.{1,200}?)(?:\.|\n|$)", text)
    return " ".join((found[1] if found else type(error).__name__).split())


def _make_folder() -> Path:
    """A folder for Ray's files; those of processes that are dead go."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > _LONGEST:
        root = Path("/tmp")
    for path in root.glob(f"{_PREFIX}*"):
        pid = path.name[len(_PREFIX) :].partition("-")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))


def _is_alive(pid: int) -> bool:
    """Return whether a process lives; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return not Path("/proc/self").exists()


def _children() -> Iterator[int]:
    """Processes that this one has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[1]) == os.getpid():
                yield int(folder.name)


class _Silent(io.TextIOBase):
    """Stands for standard output, which Ray prints messages to; results are written to its descriptor directly."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return bool(self._stream) and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: what is printed to standard output is dropped."""
    stream = sys.stdout
    sys.stdout = _Silent(stream)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout = stream
