"""`emt plan`: what `emt transfer` would do."""

from __future__ import annotations

from emt_cli.batch.options import TransferOptions, takes_options


@takes_options
def plan(options: TransferOptions) -> None:
    """Show what `emt transfer` with the same arguments would do, without loading anything.

    Lists the jobs, what is done already, and estimated time and memory; finds missing weights, words that the model
    does not know, clips that are too short, impossible sizes and full disks. Exit code 1 if something in it cannot be
    done.
    """
    from emt_cli.batch.planning import show

    show(options)
