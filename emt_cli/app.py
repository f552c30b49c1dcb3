"""The `emt` program: registers the commands and turns every failure into a message and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from emt import EmtError, __version__
from emt_cli import doctor, import_weights, plan, rerun, transfer

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="emt",
    help="Video motion transfer in batches: new clips that move like the references and show what the prompts say.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("transfer")(transfer.transfer)
app.command("plan")(plan.plan)
app.command("rerun")(rerun.rerun)
app.command("doctor")(doctor.doctor)
app.command("import-weights")(import_weights.import_weights)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"emt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def _silence_stdout() -> None:
    # After a closed pipe the interpreter flushes stdout once more at exit and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run `emt` and exit: 0 done, 1 failed, 2 bad usage, 130 interrupted; a closed pipe ends quietly with 0."""
    try:
        code = app(standalone_mode=True)
    except EmtError as error:
        print(f"error: {error.problem}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
