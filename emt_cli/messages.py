"""Lines for people: on standard error as far as they are wanted there, and in a log file.

`--quiet` leaves warnings and errors, `--verbose` adds what is passed over otherwise: phases as they begin, jobs that
are done already, lines that libraries log. `--log-file` takes all of it, whatever is shown.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from emt.errors import EmtError
from emt_cli.streams import print_last
from emt_cli.text import printable

if TYPE_CHECKING:
    from logging import Handler

    from rich.console import Console

# The levels of `logging`, which is imported where a log is kept.
DETAIL, NOTE, WARNING, ERROR = 10, 20, 30, 40

_shown = NOTE
_log: Handler | None = None


def start(quiet: bool = False, verbose: bool = False, log_file: Path | None = None) -> None:
    """Choose what is shown and kept from here on; called once in a process.

    Args:
        quiet: Show warnings and errors alone.
        verbose: Show details too.
        log_file: Keep all lines there, after those that are in it.

    Raises:
        EmtError: the file cannot be written to.
    """
    global _shown, _log
    _shown = WARNING if quiet else DETAIL if verbose else NOTE
    if log_file is None and not verbose:
        return
    import logging

    root = logging.getLogger()
    if verbose:
        root.addHandler(logging.StreamHandler())
    if log_file is not None:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            _check_log(log_file)
            _log = _handler(log_file)
        except OSError as error:
            problem = f"--log-file {log_file} cannot be written: {error.strerror}"
            raise EmtError(problem, "Name another file.") from None
        _log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(_log)
    for name in ("emt", "diffusers", "transformers", "huggingface_hub", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.INFO)


def _handler(log_file: Path) -> Handler:
    """Writes lines to a log file as long as it takes them, and says once that it does not."""
    import logging

    class LogFile(logging.FileHandler):
        failed = False

        def handle(self, record: logging.LogRecord) -> bool:
            return not self.failed and bool(super().handle(record))

        def handleError(self, record: logging.LogRecord) -> None:
            if not self.failed:
                self.failed = True
                reason = getattr(sys.exc_info()[1], "strerror", "") or sys.exc_info()[1]
                print_last(printable(f"warning: --log-file {log_file} takes nothing more: {reason}"))

        def close(self) -> None:
            with suppress(OSError):  # what it could not write, it cannot write at its end
                super().close()

    return LogFile(log_file, encoding="utf-8", errors="backslashreplace")


def _check_log(path: Path) -> None:
    """Raise EmtError if a file is there that is no log: a clip, a journal, a record would be damaged."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        content = file.read(1 << 12)
    if b"\0" in content or content.lstrip()[:1] in (b"{", b"["):
        raise EmtError(f"--log-file {path} is there, and no log", "Name another file; lines are added to its end.")


def level_of(text: str) -> int:
    """Level of a line, by the word that it begins with."""
    return {"error": ERROR, "warning": WARNING}.get(text.partition(":")[0], NOTE)


def shows(level: int) -> bool:
    """Return whether lines of a level are shown."""
    return level >= _shown


def keep(text: str, level: int) -> None:
    """Write a line to the log file, where there is one."""
    if _log is not None:
        import logging

        record = logging.LogRecord("emt_cli", level, "", 0, printable(text), None, None)
        _log.handle(record)


def say(text: object, level: int = 0) -> None:
    """A line for people on standard error, safe for a terminal, and in the log.

    Args:
        text: The line.
        level: How much it matters; by its first word if 0.
    """
    level = level or level_of(str(text))
    keep(str(text), level)
    if shows(level):
        print_last(printable(text))


def console() -> Console:
    """Standard error for bars and tables, which `--quiet` leaves out."""
    from rich.console import Console

    return Console(stderr=True, quiet=not shows(NOTE))
