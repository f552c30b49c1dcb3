"""The `emt` program: turns every failure into a message and an exit code.

Nothing is imported here before `main` is called, so that an interrupt finds it as early as can be.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # as type checkers know it; importing `typing` takes as long as all else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Run `emt` and exit: 0 done, 1 failed, 2 bad usage, 130 interrupted; a closed pipe ends quietly with 0."""
    let_threads_sleep()
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, _leave)  # an exception would pass through imports, some of which catch it
    from emt_cli import streams

    streams.open_standard_streams()
    from emt_cli.commands.group import app

    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if interruptible:
        signal.signal(signal.SIGINT, interrupt)
    code = _run(app, came)
    error = streams.flush_standard_output()
    if error and not isinstance(error, BrokenPipeError):
        _print(f"error: cannot write to {streams.OUTPUT}: {error.strerror}")
        code = code or EXIT_FAILED
    sys.exit(code)


def let_threads_sleep() -> None:
    """Have OpenMP's threads sleep while they wait for each other, unless the environment says how they wait.

    By default they spin: where another program has one of the processors, a clip takes several times as long. OpenMP
    reads the variable when PyTorch is imported; processes that are started from here inherit it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _leave(number: int, frame: object) -> None:
    os._exit(EXIT_INTERRUPTED)


def _run(app: Callable[..., object], came: list[int]) -> int:
    """Run a command; returns its exit code.

    Args:
        app: The commands.
        came: Has a number once an interrupt has come; whatever error a library makes of that, it is one.
    """
    from emt.errors import EmtError

    if not _has_working_folder():
        return _without_working_folder()
    try:
        try:
            code = app(standalone_mode=False)
            return code if isinstance(code, int) else 0
        except Exception as error:
            if came:
                raise KeyboardInterrupt from None
            if hasattr(error, "format_message"):  # of the parser: typer brings its own click, or not
                return _bad_usage(error)
            if type(error).__name__ == "Abort":  # a question was answered by the end of input
                return EXIT_FAILED
            raise
    except SystemExit as stop:
        # Libraries that write to a pipe without a reader end with 1; here it is the reader's way to say: enough.
        closed = isinstance(stop.__context__, BrokenPipeError)
        return 0 if closed else stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except EmtError as error:
        from emt_cli.batch.options import UsageError
        from emt_cli.text import unbroken

        _print(f"error: {unbroken(error.problem)}\n{error.hint}")
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    except KeyboardInterrupt:
        _print("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except OSError as error:
        from emt_cli.streams import OUTPUT

        if isinstance(error, FileNotFoundError) and not error.filename and not _has_working_folder():
            return _without_working_folder()
        if error.filename != OUTPUT:  # that is said at the end
            _print(f"error: {error.strerror or error}" + (f" ({error.filename})" if error.filename else ""))
        return EXIT_FAILED
    except Exception as error:
        return _unexpected(error)


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _without_working_folder() -> int:
    """Say that the working folder is gone: libraries of PyTorch end the process there, whatever paths are given."""
    _print("error: the working folder was removed\nChange into another one: cd FOLDER")
    return EXIT_FAILED


def _unexpected(error: Exception) -> int:
    """Say in two lines what nobody has foreseen, and keep where it came from for whoever mends it."""
    import tempfile
    import traceback

    where = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="emt-fault-", suffix=".txt", delete=False, errors="replace"
        ) as file:
            traceback.print_exception(error, file=file)
            where = f" with {file.name}"
    except OSError:
        pass
    said = str(error).strip().split("\n", 1)[0][:500]
    _print(f"error: {type(error).__name__}: {said}\nThis is a fault of emt: please report it{where}.")
    return EXIT_FAILED


def _bad_usage(error: Any) -> int:
    """Say in a line which argument the parser does not take, and what it may have been meant to be."""
    from emt_cli.commands.group import describe_error

    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        _print(f"error: {describe_error(error)}")
    return error.exit_code


def _print(text: str) -> None:
    from emt_cli.messages import ERROR, say

    for line in text.rstrip("\n").split("\n"):
        say(line, ERROR)


if __name__ == "__main__":
    main()
