"""`emt transfer`: clips and prompts in, finished clips out."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain

import typer

from emt_cli.batch.options import TransferOptions
from emt_cli.commands.arguments import takes_options


@takes_options
def transfer(options: TransferOptions) -> None:
    """Make clips that move like the references and show what the prompts say.

    Every reference goes with every prompt and seed. Results are OUT/<reference>/<prompt>-<seed>.mp4, each with its
    settings in a .json beside it; OUT/journal.jsonl has what became of each job. Run it again and finished clips are
    skipped, unfinished ones done. No finished clip is ever replaced without --overwrite, nor one that was edited in its
    place: made with other settings, another model or precision, a clip of the same reference, prompt and seed gets a
    name of its own, <prompt>-<seed>_<hash>.mp4.

    With --best-of N each job makes N clips, with its seed and those after it, and keeps the one whose motion, measured
    on tracks of points, follows the reference best; its record has all scores. With --evaluate the results are measured
    at the end, and with --report a page shows them.

    With --shard i/n it does one of n parts of the jobs; n such runs, on one machine or many, share OUT, and each writes
    a journal of its own, OUT/journal-shard-i-of-n.jsonl.

    Standard output has the paths of the clips, or with --json a line for each job; all else is on standard error.
    Ctrl-C finishes the running batch, a second one stops at once; with --watch the first is the end, and no failure.
    Exit codes: 0 all done (or the reader of standard output has gone), 1 some failed (or standard output is full),
    2 bad usage, 130 interrupted.
    """
    from emt.cache import ContentIndex, default_dir
    from emt.model_folder import find_model
    from emt.remote import Announcer, is_url, trim_copies
    from emt_cli.batch.best_of import check_measuring, check_tracking
    from emt_cli.batch.generator import start_ahead
    from emt_cli.batch.inputs import PromptWarnings, expand, settings_of
    from emt_cli.batch.inputs.seeds import FILE_NAME as SEEDS
    from emt_cli.batch.inputs.shapes import Shapes
    from emt_cli.batch.jobs import Job, numerics
    from emt_cli.batch.journal import Journal
    from emt_cli.batch.published import Published, PublishedJournal
    from emt_cli.batch.session import RunOptions, SessionOptions, open_session
    from emt_cli.commands.plan import show
    from emt_cli.executors.choice import choose_executor
    from emt_cli.executors.local import LocalExecutor
    from emt_cli.terminal import ProgressReporter, Results
    from emt_engines.choice import engine_id

    if options.dry_run:
        show(options)
        return
    with ProgressReporter(Results.JSON if options.json else Results.PATHS) as reporter, ExitStack() as ahead:
        reporter.phase("looking for the model and clips")
        trim_copies(options.cache_size * 1e9)
        model = find_model(options.model, download=True, on_fetch=Announcer(reporter.say))
        shapes = Shapes(model, ContentIndex(options.disk_cache or default_dir()))
        published = Published(options.out, reporter.say) if is_url(options.out) else None
        folder = published.folder if published else options.out
        listed, streamed = expand(options, model.defaults, reporter.say, shapes, folder=folder)
        for job in listed:
            if isinstance(job, Job):
                check_tracking(job)
        if options.evaluate:
            check_measuring()
        reporter.total = None if options.watch or "-" in (options.references or []) else len(listed)
        if options.model is None:
            reporter.say(model.introduction())
        words = PromptWarnings(model.name, model.vocabulary, reporter.say, model.reads_syntax)
        words.look(listed)
        chosen = SessionOptions.of(options)
        executor = choose_executor(options, chosen)
        if executor is LocalExecutor and listed and not any(folder.glob("journal*.jsonl")):
            ahead.enter_context(start_ahead(options.device))  # hashing a model for the first time takes seconds
        session = open_session(chosen, options.device, reporter.say, model)
        # What is not there fails at once, not job by job.
        session.generator.addons.find(settings_of(options, model.defaults))
        jobs = [job for job in listed if isinstance(job, Job)]
        texts = (text for job in jobs for text in (job.prompt, job.settings.negative_prompt))
        session.generator.prompts = list(dict.fromkeys(texts))
        how = RunOptions.of(options, numerics(options, engine_id(options.engine)))
        if options.watch:
            reporter.say(f"watching {', '.join(options.references or [])}: drop clips in; Ctrl-C ends the run")
        part = options.part
        journal: Journal
        if published:
            published.publish_small(SEEDS)
            writer, beside = published.writer(part.writer), published.beside(part.is_beside)
            journal = PublishedJournal(published, reporter.say, writer, beside=beside)
        else:
            journal = Journal(options.out, part.writer, beside=part.is_beside)
        try:
            summary = executor(session, journal, reporter, how).run(chain(listed, words.watch(streamed)))
        finally:
            journal.close()
        summary.interrupted = summary.interrupted and not options.watch  # that is how it ends
        if options.evaluate and not summary.interrupted:
            from emt_cli.commands.evaluate import evaluate_results

            reporter.say("measuring the results …")
            reporter.say(evaluate_results(options.out, options.device))
        if options.report:
            from emt_cli.report.published import publish_report

            reporter.say(f"report: {publish_report([options.out], reporter.say)}")
    if code := summary.exit_code(gone=reporter.gone, undelivered=reporter.failed):
        raise typer.Exit(code)
