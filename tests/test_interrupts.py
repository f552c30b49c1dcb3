"""Signals of a run, and what is left of it when it has ended."""

from __future__ import annotations

import gc
import weakref

from emt_cli.executors.interrupts import Interrupts


class Run:
    """Run, of which the callbacks are methods; a real one has tensors on its device."""

    def idle(self) -> bool:
        return True

    def end(self) -> None: ...


def test_k3_nothing_holds_a_run_that_has_ended():
    """A thread that lets go of it later frees its tensors while the interpreter ends, which aborts the process."""
    gc.disable()  # what is freed is freed by the last reference
    try:
        for _ in range(100):
            run = Run()
            freed = weakref.ref(run)
            with Interrupts(run.idle, run.end, run.end):
                pass
            del run
            assert freed() is None
    finally:
        gc.enable()
