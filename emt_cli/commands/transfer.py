"""`emt transfer`: clips and prompts in, finished clips out."""

from __future__ import annotations

import sys
from itertools import chain

import typer

from emt_cli.batch.options import Memory, TransferOptions, parse_batch_size
from emt_cli.commands.arguments import takes_options


@takes_options
def transfer(options: TransferOptions) -> None:
    """Make clips that move like the references and show what the prompts say.

    Every reference goes with every prompt and seed. Results are OUT/<reference>/<prompt>-<seed>.mp4, each with
    its settings in a .json beside it; OUT/journal.jsonl tells what became of each job. Run it again and finished
    clips are skipped, unfinished ones done. With --best-of N each job makes N clips, with its seed and those after it,
    and keeps the one whose motion, measured on tracks of points, follows the reference best; its record has all scores.

    Standard output has the paths of the clips, or with --json a line for each job; all else is on standard error.
    Ctrl-C finishes the running batch, a second one stops at once.
    Exit codes: 0 all done (or the reader of standard output has gone), 1 some failed, 2 bad usage, 130 interrupted.
    """
    from emt.cache import ContentIndex, MotionCache, default_dir
    from emt.model_folder import find_model
    from emt_cli.batch.best_of import check_tracking
    from emt_cli.batch.generator import Generator
    from emt_cli.batch.inputs import UnknownWords, expand
    from emt_cli.batch.jobs import Job, numerics
    from emt_cli.batch.journal import Journal
    from emt_cli.commands.plan import show
    from emt_cli.executors.local import Runner
    from emt_cli.terminal import ProgressReporter
    from emt_engines.choice import EngineChoice, engine_id, engines_dir

    if options.dry_run:
        show(options)
        return
    model = find_model(options.model, download=True)
    listed, streamed = expand(options, model.defaults)
    for job in listed:
        if isinstance(job, Job):
            check_tracking(job)
    folder = options.cache_dir or default_dir()
    listener = ProgressReporter(None if "-" in (options.references or []) else len(listed))
    index = ContentIndex(folder, listener.say)
    if options.model is None:
        listener.say(model.introduction())
    words = UnknownWords(model.name, model.vocabulary, listener.say)
    words.look(listed)
    low_memory = options.memory is Memory.LOW
    engines = None
    if not low_memory:
        engines = EngineChoice(options.engine, model, index, engines_dir(options.cache_dir), listener.say)
    generator = Generator(
        model,
        model.sha256(index),
        options.device,
        options.precision.value,
        engines,
        kernels=options.kernels.value,
        low_memory=low_memory,
        say=listener.say,
    )
    journal = Journal(options.out)
    try:
        runner = Runner(
            journal,
            generator,
            index,
            MotionCache(folder / "motion", options.cache_size * 1e9, listener.say),
            listener,
            precision=numerics(options, engine_id(options.engine)),
            batch_size=parse_batch_size(options.batch_size) or (1 if low_memory else None),
            overwrite=options.overwrite,
            json=options.json,
        )
        summary = runner.run(chain(listed, words.watch(streamed)))
    finally:
        journal.close()
    if options.report:
        from emt_cli.report.page import write_report

        print(f"report: {write_report(options.out)}", file=sys.stderr)
    if summary.interrupted:
        raise typer.Exit(130)
    if summary.pipe_closed:
        raise BrokenPipeError
    if summary.counts["failed"]:
        raise typer.Exit(1)
