"""Steps of a build that run a compiler: what fails is tried once more, then reported in a few lines, with a log."""

from __future__ import annotations

import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from emt.cache import default_dir
from emt.errors import EmtError, first_line

T = TypeVar("T")

ATTEMPTS = 2
#: A line of a compiler's output that says what is wrong.
_ERROR = re.compile(r"\berror: *(.+)", re.IGNORECASE)


def new_log(step: str) -> Path:
    """An empty file for the output of a step's compilers: in the user's cache, or where temporary files are.

    Args:
        step: Words for the file's name.
    """
    prefix = "-".join(re.findall(r"\w+", step)) + "-"
    try:
        folder = default_dir() / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return _empty(prefix, folder)
    except OSError:
        return _empty(prefix, None)


def _empty(prefix: str, folder: Path | None) -> Path:
    with tempfile.NamedTemporaryFile(prefix=prefix, suffix=".log", dir=folder, delete=False) as file:
        return Path(file.name)


def summary(error: BaseException) -> str:
    """One line that says what went wrong: the first error of a compiler, or the first line of the message."""
    found = _ERROR.search(str(error))
    said = found[1] if found else first_line(error)
    return f"{type(error).__name__}: {said[:200].strip()}"


def failed(step: str, reason: str, log: Path) -> EmtError:
    """The error of a step that failed in all attempts.

    Args:
        step: As in "compiling denoise for 512x512".
        reason: One line.
        log: The output of the compilers.
    """
    return EmtError(
        f"{step} failed {ATTEMPTS} times: {reason}",
        f"All of the output is in {log}: please report it with that file. Clips can be made without an engine.",
    )


def repeat(step: str, work: Callable[[], T], say: Callable[[str], None]) -> T:
    """Run a step, and once more if it fails by anything but an `EmtError`.

    Args:
        step: As in "compiling denoise for 512x512".
        work: The step.
        say: Called with the step when it begins, and with a line before the second attempt.

    Raises:
        EmtError: it failed twice; or `work` raised one.
    """
    log: Path | None = None
    say(step)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            found = work()
        except EmtError:
            raise
        except Exception as error:
            log = log or new_log(step)
            with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
                traceback.print_exception(error, file=file)
            reason = summary(error)
            if attempt == ATTEMPTS:
                raise failed(step, reason, log) from error
            say(f"{step}: {reason}; trying once more")
        else:
            if log is not None:
                log.unlink(missing_ok=True)
            return found
    raise AssertionError("unreachable")
