"""Change the code in one place at a time, and see whether the tests notice (mutation testing).

    python benchmarks/mutants.py --folder build/mutants
    python benchmarks/mutants.py --folder build/mutants --table

cosmic-ray makes the changes: another operator, another number, a condition turned round, a handler of another
exception, a decorator less. `mutants.json` has the files that decide what a clip is, each with the files of tests that
ought to notice, and the mutants that were read and are equivalent: no test can tell them from the code. Of each file a
random sample is taken, the same for the same code and `--seed`: places first, then one change at each, so that an
expression with eleven changes counts as often as one with two.

The work is done on a copy. For each file of the code pytest collects its tests once; for each mutant a process is
forked from there, in which the changed functions get the mutant's bytecode, and which runs the tests that execute the
changed statement (of a constant, the statements that name it), the quickest first, `--seconds` of them, up to the first
failure. Which tests these are is measured beforehand, with coverage.py, and only again where a file has changed. A test
that fails without the mutant, too, is left out. `--survivors` with more seconds runs slower tests, too. `--minutes`
ends a piece of work; the next call goes on from there. `--processes` works on several files at once, each process on
its own copy.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gc
import hashlib
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MAP = Path(__file__).with_suffix(".json")

#: Operators whose changes no test can see, as a rule: `is` and `==` of enumerations and None.
_ALIKE = ("_Is_Eq", "_IsNot_NotEq", "_Eq_Is", "_NotEq_IsNot")


def main(command_line: list[str] | None = None) -> None:
    """Run mutants, or show the score."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("files", nargs="*", help="of the code, by default all of mutants.json")
    arguments.add_argument("--folder", type=Path, required=True, help="the copy, and results")
    arguments.add_argument("--sample", type=int, default=30, help="mutants a file")
    arguments.add_argument("--seed", type=int, default=0, help="of the sample")
    arguments.add_argument("--seconds", type=float, default=8, help="of processor time of a mutant's tests")
    arguments.add_argument("--minutes", type=float, default=float("inf"))
    arguments.add_argument("--processes", type=int, default=1)
    arguments.add_argument("--survivors", action="store_true", help="run those again that survived")
    arguments.add_argument("--table", action="store_true", help="print scores and survivors")
    given = arguments.parse_args(command_line)
    folder, settings = given.folder.resolve(), json.loads(_MAP.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    files = given.files or list(settings["tests"])
    end = time.monotonic() + 60 * given.minutes
    results = Results(folder / "results.jsonl")
    if given.table:
        samples = {file: kept_sample(folder, file, given.sample, given.seed) for file in files}
        print_table(samples, results, settings["equivalent"])
        return
    preload(files)
    work = functools.partial(run_file, folder, given.sample, given.seed, given.seconds, end, given.survivors)
    if given.processes == 1:
        for file in files:
            work(file, copy_tree(folder / "tree"))
        return
    tests = sorted({test for file in files for test in settings["tests"][file]})
    forked = multiprocessing.get_context("fork")
    taken = forked.Value("i", 0)
    with ProcessPoolExecutor(given.processes, forked, _take_copy, (folder, taken)) as pool:
        for _ in pool.map(_on_copy, [functools.partial(measure, folder, test, files[0]) for test in tests]):
            pass
        for _ in pool.map(_on_copy, [functools.partial(work, file) for file in files]):
            pass


def run_file(
    folder: Path, count: int, seed: int, seconds: float, end: float, survivors: bool, file: str, tree: Path
) -> None:
    """Run the mutants of a file's sample that have not been run, or those that survived, too."""
    settings, results = json.loads(_MAP.read_text()), Results(folder / "results.jsonl")
    mutants = kept_sample(folder, file, count, seed)
    waiting = [m for m in mutants if results.outcome(m) in ((None, "survived") if survivors else (None,))]
    if not waiting or time.monotonic() > end:
        return
    tests = settings["tests"][file]
    coverage = Coverage(folder, tree, file, tests, seconds)
    path = tree / file
    source = path.read_text()
    inside = [m for m in waiting if changed_functions(path, source, mutated(source, m)) is not None]
    if inside:
        work = functools.partial(run_mutants, tree, inside, tests, coverage, results, end)
        code, log = run_forked(tree, work, 36000, 36000)
        print(f"{file}: pytest of {len(inside)} ended with {code} {log[-1000:] if code > 1 else ''}", flush=True)
    for mutant in waiting:
        if mutant not in inside and time.monotonic() < end:
            results.add(mutant, try_anew(tree, mutant, coverage))


_copy = Path()  # of a process of several


def _take_copy(folder: Path, taken: Any) -> None:
    """Bring the copy of a process that begins up to date."""
    global _copy
    with taken.get_lock():
        taken.value += 1
        number = taken.value
    _copy = copy_tree(folder / f"tree-{number}")


def _on_copy(work: Callable[[Path], None]) -> None:
    try:
        work(tree=_copy)  # type: ignore[call-arg]
    except SystemExit as error:
        print(error, flush=True)


@dataclass(frozen=True)
class Mutant:
    """A change of a file; `sha256` is that of the file before."""

    file: str
    sha256: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str


def kept_sample(folder: Path, file: str, count: int, seed: int) -> list[Mutant]:
    """`sample`, kept in the folder: making the mutants of a long file takes seconds."""
    sha256 = hashlib.sha256((ROOT / file).read_bytes()).hexdigest()
    kept = folder / "samples" / f"{file.replace('/', '-')}-{sha256[:16]}-{count}-{seed}.json"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps([asdict(mutant) for mutant in sample(ROOT / file, file, count, seed)]))
    return [Mutant(**row) for row in json.loads(kept.read_text())]


def sample(path: Path, file: str, count: int, seed: int) -> list[Mutant]:
    """Some mutants of a file, at as many places."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = path.read_text()
    sha256, chance = hashlib.sha256(source.encode()).hexdigest(), random.Random(f"{seed} {file}")
    places: dict[tuple[int, int], list[tuple[str, int]]] = {}
    tree = get_ast(source)
    for name in operator_names():
        if get_operator(name).arguments() or name.endswith(_ALIKE):
            continue
        operator = get_operator(name)()
        positions = [p for node in ast_nodes(tree) for p in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(positions):
            places.setdefault(start, []).append((name, occurrence))
    chosen: list[Mutant] = []
    original = _meaning(source)
    for place in chance.sample(sorted(places), len(places)):
        if len(chosen) == count:
            break
        name, occurrence = chance.choice(places[place])
        changed = None
        with contextlib.suppress(AttributeError):  # the operator of handlers knows no dotted names
            changed = mutate_code(source, get_operator(name)(), occurrence)
        if changed is None or _meaning(changed) in ("", original):
            continue
        old, new = source.split("\n"), changed.split("\n")
        different = [n for n, (a, b) in enumerate(itertools.zip_longest(old, new)) if a != b]
        first = different[0]
        same_after = next(n for n in range(1, len(old)) if old[-n] != new[-n]) - 1
        after = " ".join(line.strip() for line in new[first : len(new) - same_after]).strip()
        before = " ".join(line.strip() for line in old[first : len(old) - same_after]).strip()
        chosen.append(Mutant(file, sha256, name, occurrence, place[0], before, after))
    return sorted(chosen, key=lambda mutant: mutant.line)


def _meaning(source: str) -> str:
    """The syntax tree without what does nothing at runtime, annotations and imports for type checkers; or nothing.

    Nothing is what is no Python any more, such as a `*` of parameters that was taken for a multiplication.
    """

    class Strip(ast.NodeTransformer):
        def visit_arg(self, node: ast.arg) -> ast.arg:
            node.annotation = None
            return node

        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            node.returns = None
            return self.generic_visit(node)

        def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
            node.annotation = ast.Constant(None)
            return self.generic_visit(node)

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    try:
        return ast.dump(Strip().visit(ast.parse(source)))
    except SyntaxError:
        return ""


def copy_tree(tree: Path) -> Path:
    """Bring a copy up to date with the files that git knows here; returns where it is."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    names = {name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()}
    for name in names:
        target, content = tree / name, (ROOT / name).read_bytes()
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    for path in list(tree.rglob("*.py")):
        if str(path.relative_to(tree)) not in names:
            path.unlink()
    return tree


def preload(files: list[str]) -> None:
    """Import what the files import of libraries, but nothing of the project itself."""
    own = ("emt", "emt_cli", "emt_engines", "emt_kernels", "__main__")
    names = [*map(_module, files), "emt.pipeline", "emt_cli.commands.group"]
    code = f"import {', '.join(names)}, sys; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, _paths(ROOT)), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for name in ["pytest", "hypothesis", *done.stdout.split()]:
        if name.split(".")[0] not in own:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _module(file: str) -> str:
    return file.removeprefix("engines/").removeprefix("kernels/")[:-3].replace("/", ".")


def _paths(tree: Path) -> list[Path]:
    return [tree, tree / "kernels", tree / "engines"]


class Results:
    """Outcomes of mutants, the last of each, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[tuple[str, str, str, int], dict[str, Any]] = {}
        if path.exists():
            for line in map(json.loads, path.read_text().splitlines()):
                self._outcomes[line["file"], line["sha256"], line["operator"], line["occurrence"]] = line

    def add(self, mutant: Mutant, outcome: dict[str, Any]) -> None:
        """Write an outcome."""
        with open(self._path, "a") as file:
            file.write(json.dumps(asdict(mutant) | outcome) + "\n")

    def row(self, mutant: Mutant) -> dict[str, Any]:
        """All that is known of a mutant's last run."""
        return self._outcomes.get((mutant.file, mutant.sha256, mutant.operator, mutant.occurrence), {})

    def outcome(self, mutant: Mutant) -> str | None:
        """`killed`, `survived`, or None before its first run."""
        return self.row(mutant).get("outcome")


# ------------------------------------------------------------------------------------------------------- running tests


class Coverage:
    """Tests of a file of code: seconds of each, and those that execute a line.

    Args:
        folder: Where it is kept.
        tree: The copy.
        file: Of the code.
        tests: Files of tests.
        longest: Most seconds of processor time of the tests of one mutant.

    Raises:
        SystemExit: none of the tests passes on the code as it is.
    """

    def __init__(self, folder: Path, tree: Path, file: str, tests: list[str], longest: float) -> None:
        self.seconds: dict[str, float] = {}
        self._file, self._longest = file, longest
        self._lines: dict[str, dict[int, set[str]]] = {}
        for name in tests:
            measured = measure(folder, name, file, tree)
            self.seconds |= measured["seconds"]
            for path, lines in measured["lines"].items():
                executed = self._lines.setdefault(path, {})
                for line, indices in lines.items():
                    executed.setdefault(int(line), set()).update(measured["tests"][index] for index in indices)
        if not self.seconds:
            sys.exit(f"no test of {file} passes")
        self._trees = {path: ast.parse((tree / path).read_bytes()) for path in {file, *self._lines}}

    def tests(self, line: int) -> list[str]:
        """The tests that execute the statement at a line, file by file, the quickest first, up to a sum of seconds."""
        spent, chosen = 0.0, []
        tests = self._naming(line) or self._executing(self._file, self._statement(line))
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            spent += self.seconds[test]
            if chosen and spent > self._longest:
                break
            chosen.append(test)
        files = {test: test.partition("::")[0] for test in chosen}
        sums = {file: sum(self.seconds[t] for t in chosen if files[t] == file) for file in files.values()}
        return sorted(chosen, key=lambda test: (sums[files[test]], files[test], self.seconds[test]))

    def _executing(self, file: str, lines: Iterable[int]) -> set[str]:
        executed = self._lines.get(file, {})
        return self.seconds.keys() & set().union(*(executed.get(line, ()) for line in lines))

    def _naming(self, line: int) -> set[str]:
        """The tests that execute, in any of the files that are measured, a name that the module assigns at a line."""
        names: set[str] = set()
        for node in self._trees[self._file].body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.lineno <= line <= (node.end_lineno or line):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        tests: set[str] = set()
        for file, tree in self._trees.items() if names else ():
            for node in ast.walk(tree):
                named = getattr(node, "id", getattr(node, "attr", None))
                if named in names and isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                    tests |= self._executing(file, range(node.lineno, (node.end_lineno or node.lineno) + 1))
        return tests

    def _statement(self, line: int) -> Iterable[int]:
        """Lines of the statement at a line; of what is executed at import, those of all that comes of it.

        That is the function whose default or decorator it is, or all functions of the file.
        """
        tree = self._trees[self._file]
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        bodies = [range(f.body[0].lineno, (f.end_lineno or 0) + 1) for f in functions]
        heads = [range(min([f.lineno, *(d.lineno for d in f.decorator_list)]), f.body[0].lineno) for f in functions]
        headed = [body for head, body in zip(heads, bodies) if line in head]
        if headed:
            return headed[-1]
        if not any(line in body for body in bodies):
            return itertools.chain(*bodies)
        statement = range(line, line + 1)
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                body = getattr(node, "body", None)
                lines = range(node.lineno, body[0].lineno if body else (node.end_lineno or line) + 1)
                if line in lines:
                    statement = lines  # a later one lies deeper
        return statement


def measure(folder: Path, name: str, file: str, tree: Path) -> dict[str, Any]:
    """Seconds of each test of a file, and the lines of each file of the code that it executes.

    Args:
        folder: Where it is kept.
        name: File of tests.
        file: Of the code, which must be as it was when this was measured.
        tree: The copy.

    Raises:
        SystemExit: the tests could not be run.
    """
    kept = folder / "coverage" / f"{Path(name).stem}.json"
    test, source = (hashlib.sha256((tree / path).read_bytes()).hexdigest() for path in (name, file))
    if kept.exists():
        measured: dict[str, Any] = json.loads(kept.read_text())
        if measured["test"] == test and measured["sha256"].get(file) == source:
            return measured
    kept.parent.mkdir(exist_ok=True)
    targets = json.loads(_MAP.read_text())["tests"]
    with tempfile.TemporaryDirectory(prefix="emt-measured-") as scratch:
        written = Path(scratch) / "measured.json"
        code, log = run_forked(tree, lambda: _measure_tests(tree, name, list(targets), written), 1800, 3600)
        if not written.exists():
            sys.exit(f"{name} ended with {code}: {log[-3000:]}")
        measured = json.loads(written.read_text())
    measured["test"] = test
    measured["sha256"] = {f: hashlib.sha256((tree / f).read_bytes()).hexdigest() for f in targets}
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(measured))
    partial.replace(kept)
    print(f"{name}: {len(measured['seconds'])} tests pass, not in these runs: {measured['failed']}", flush=True)
    return measured


def run_mutants(
    tree: Path, mutants: list[Mutant], files: list[str], coverage: Coverage, results: Results, end: float
) -> int:
    """Run mutants of one file until a moment of the monotonic clock; returns the exit code of pytest."""
    for name in ("emt.pipeline", "emt_cli.commands.group", "emt_cli.executors.local", _module(mutants[0].file)):
        importlib.import_module(name)
    return _pytest(tree, files, (_Mutants(tree, mutants, coverage, results, end),))


class _Mutants:
    """A plugin: instead of running the tests once, it runs for each mutant those that ought to notice."""

    def __init__(self, tree: Path, mutants: list[Mutant], coverage: Coverage, results: Results, end: float) -> None:
        self._tree, self._mutants, self._coverage, self._results, self._end = tree, mutants, coverage, results, end
        self._sound: dict[str, bool] = {}
        self._failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._failed = self._failed or report.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        items = {item.nodeid: item for item in session.items}
        for mutant in self._mutants:
            if time.monotonic() > self._end:
                break
            begun = time.monotonic()
            outcome = self._try(mutant, items)
            self._results.add(mutant, outcome | {"seconds": round(time.monotonic() - begun, 1)})
        return True

    def _try(self, mutant: Mutant, items: dict[str, Any]) -> dict[str, Any]:
        path = self._tree / mutant.file
        source = path.read_text()
        changed = mutated(source, mutant)
        changes = changed_functions(path, source, changed)
        assert changes is not None
        while True:
            tests = [t for t in self._coverage.tests(mutant.line) if t in items and self._sound.get(t, True)]
            if not tests:
                return {"outcome": "survived", "tests": 0}
            try:
                path.write_text(changed)
                code, by = self._fork([items[t] for t in tests], lambda: replace_functions(path, changes))
            finally:
                path.write_text(source)
            if code == 0 or not by or self._is_sound(by, items):
                return {"outcome": "survived" if code == 0 else "killed", "tests": len(tests), "code": code, "by": by}

    def _is_sound(self, test: str, items: dict[str, Any]) -> bool:
        """Whether a test passes without a mutant."""
        if test not in self._sound:
            self._sound[test] = self._fork([items[test]], lambda: None)[0] == 0
        return self._sound[test]

    def _fork(self, items: list[Any], prepare: Callable[[], None]) -> tuple[int, str]:
        seconds = sum(self._coverage.seconds[item.nodeid] for item in items)

        def work() -> int:
            prepare()
            for item, following in zip(items, [*items[1:], None]):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self._failed:
                    (Path(os.environ["TMPDIR"]) / "output").write_text(item.nodeid)
                    return 1
            return 0

        return run_forked(self._tree, work, 15 + 3 * seconds, 90 + 10 * seconds, streams=False)


def mutated(source: str, mutant: Mutant) -> str:
    """The source of a mutant."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return str(mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence))


def changed_functions(path: Path, before: str, after: str) -> dict[tuple[str, int], types.CodeType] | None:
    """Bytecode of the functions that differ, by name and line; None if what is executed at import differs."""
    changes: dict[tuple[str, int], types.CodeType] = {}
    try:
        old, new = (compile(source, str(path), "exec", dont_inherit=True) for source in (before, after))
    except SyntaxError:
        return None
    return changes if _compare(old, new, changes) else None


def replace_functions(path: Path, changes: dict[tuple[str, int], types.CodeType]) -> None:
    """Give functions other bytecode; they stay the objects that they are, so that whoever has them has the change."""
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__code__.co_filename == str(path):
            code = changes.get((thing.__code__.co_qualname, thing.__code__.co_firstlineno))
            if code is not None:
                thing.__code__ = code


def _compare(old: types.CodeType, new: types.CodeType, changes: dict[tuple[str, int], types.CodeType]) -> bool:
    """Collect the functions that differ; False if what runs at import does, of the module or of a class."""
    pairs = [[c for c in code.co_consts if isinstance(c, types.CodeType)] for code in (old, new)]
    if old.co_code != new.co_code or len(pairs[0]) != len(pairs[1]) or old.co_names != new.co_names:
        return False
    plain = [[c for c in code.co_consts if not isinstance(c, types.CodeType)] for code in (old, new)]
    if repr(plain[0]) != repr(plain[1]):
        return False
    same = True
    for one, other in zip(*pairs):
        if one == other:
            continue
        if one.co_flags & inspect.CO_OPTIMIZED:  # a function; the body of a class is not
            changes[one.co_qualname, one.co_firstlineno] = other
        else:
            same = _compare(one, other, changes) and same
    return same


def try_anew(tree: Path, mutant: Mutant, coverage: Coverage) -> dict[str, Any]:
    """Run a mutant in what is executed at import: everything is imported anew."""
    path = tree / mutant.file
    source, tests = path.read_text(), coverage.tests(mutant.line)
    if not tests:
        return {"outcome": "survived", "tests": 0}
    seconds = sum(coverage.seconds[test] for test in tests)
    try:
        path.write_text(mutated(source, mutant))
        code, log = run_forked(tree, lambda: _pytest(tree, tests), 25 + 3 * seconds, 120 + 10 * seconds)
    finally:
        path.write_text(source)
    failed = next((line for line in log.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    return {"outcome": "survived" if code == 0 else "killed", "tests": len(tests), "code": code, "by": failed[:300]}


def run_forked(
    tree: Path, work: Callable[[], int], processor: float, wall: float, *, streams: bool = True
) -> tuple[int, str]:
    """Do work in a process of its own; returns its exit code and what is in `output` of its temporary folder.

    Args:
        tree: The copy, its working folder.
        work: Returns the exit code.
        processor: Most seconds of processor time.
        wall: Most seconds.
        streams: Whether its standard streams go to `output`.
    """
    with tempfile.TemporaryDirectory(prefix="emt-mutant-") as scratch:
        output = Path(scratch) / "output"
        child = os.fork()
        if not child:
            code = 70
            try:
                os.setsid()
                if streams:
                    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                    os.dup2(descriptor, 1)
                    os.dup2(descriptor, 2)
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                resource.setrlimit(resource.RLIMIT_CPU, (int(processor), int(processor) + 5))
                os.environ |= {"TMPDIR": scratch, "XDG_CACHE_HOME": f"{scratch}/cache", "OMP_NUM_THREADS": "1"}
                os.environ["PYTHONPATH"] = os.pathsep.join(map(str, _paths(tree)))
                tempfile.tempdir = None
                sys.path[:0] = map(str, _paths(tree))
                os.chdir(tree)
                code = work()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                os._exit(code)
        code = _wait(child, wall)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        return code, output.read_text(errors="replace") if output.exists() else ""


def _wait(child: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -int(signal.SIGALRM)


def _pytest(tree: Path, tests: list[str], plugins: tuple[Any, ...] = (), *options: str) -> int:
    """Run tests in this process; programs under test are forked from it, with the libraries and the mutant in them."""
    own = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: own("fork" if method == "forkserver" else method)  # type: ignore[assignment]
    import pytest

    words = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", *options]
    return int(pytest.main([*words, *tests], plugins=[_Forked(), *plugins]))


class _Forked:
    """A plugin: programs that are forked from the tests' process write to their own streams."""

    def pytest_collection_finish(self) -> None:
        preloaded = sys.modules.get("preloaded")
        if preloaded is None:
            return
        program = preloaded._run

        def run(*arguments: Any) -> None:
            sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
            sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
            program(*arguments)

        preloaded._run = run


class _Contexts:
    """A plugin: measures the lines that each test executes, also in programs that it starts, and its seconds."""

    def __init__(self, files: list[Path], folder: Path) -> None:
        import coverage

        self._make = lambda name: coverage.Coverage(
            data_file=str(folder / name), include=list(map(str, files)), config_file=False, messages=False
        )
        self.folder, self._count = folder, itertools.count()
        self._coverage = self._make("tests")
        self._coverage.start()
        self._context = ""
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.fixtures: dict[str, list[str]] = {}

    def _switch(self, context: str) -> str:
        before, self._context = self._context, context
        self._coverage.switch_context(context)
        return before

    def pytest_collection_finish(self) -> None:
        preloaded = sys.modules.get("preloaded")
        if preloaded is None:
            return
        program, start = preloaded._run, preloaded.Run.__init__

        def run(*arguments: Any) -> None:
            self._coverage.stop()
            measured = self._make(f"program-{os.getpid()}-{time.monotonic_ns()}")
            measured.start()
            measured.switch_context(self._context)
            leave = os._exit

            def save(code: int) -> None:
                with contextlib.suppress(Exception):
                    measured.stop()
                    measured.save()
                leave(code)

            os._exit = save  # type: ignore[assignment]
            program(*arguments)

        preloaded._run, preloaded.Run.__init__ = run, start

    def pytest_runtest_protocol(self, item: Any) -> None:
        self.fixtures[item.nodeid] = list(item.fixturenames)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._begun = _processor_seconds()
        self._switch(nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = _processor_seconds() - self._begun
        self._switch("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def end(self) -> dict[str, dict[int, set[str]]]:
        """The contexts of each line of each file."""
        from coverage import CoverageData

        self._coverage.stop()
        self._coverage.save()
        lines: dict[str, dict[int, set[str]]] = {}
        for path in self.folder.iterdir():
            data = CoverageData(str(path))
            with contextlib.suppress(Exception):
                data.read()
                for file in data.measured_files():
                    for line, contexts in data.contexts_by_lineno(file).items():
                        lines.setdefault(file, {}).setdefault(line, set()).update(contexts)
        return lines


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _shared_fixtures(contexts: _Contexts) -> Any:
    """A plugin: lines that a fixture executes which several tests share belong to all of these."""
    import pytest

    class Shared:
        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
            if fixturedef.scope == "function":
                return (yield)
            before = contexts._switch(f"fixture {fixturedef.argname}")
            try:
                return (yield)
            finally:
                contexts._switch(before)

    return Shared()


def _measure_tests(tree: Path, name: str, files: list[str], kept: Path) -> int:
    with tempfile.TemporaryDirectory(prefix="emt-contexts-") as folder:
        contexts = _Contexts([tree / file for file in files], Path(folder))
        shared = _shared_fixtures(contexts)
        code = _pytest(tree, [name], (contexts, shared), "--maxfail=1000")
        tests = [test for test in contexts.seconds if test not in contexts.failed]
        users: dict[str, set[str]] = {}
        for test in tests:
            for fixture in contexts.fixtures[test]:
                users.setdefault(f"fixture {fixture}", set()).add(test)
        index = {test: number for number, test in enumerate(tests)}
        lines: dict[str, dict[int, list[int]]] = {}
        for file, found in contexts.end().items():
            for line, names in found.items():
                tested = set().union(*(users.get(name, {name}) for name in names)) & index.keys()
                if tested:
                    place = lines.setdefault(str(Path(file).relative_to(tree)), {})
                    place[line] = sorted(index[test] for test in tested)
        seconds = {test: contexts.seconds[test] for test in tests}
        written = {"tests": tests, "seconds": seconds, "failed": contexts.failed, "lines": lines}
        kept.write_text(json.dumps(written))
        return code


# --------------------------------------------------------------------------------------------------------------- table


def print_table(
    samples: dict[str, list[Mutant]], results: Results, equivalent: dict[str, list[dict[str, str]]]
) -> None:
    """Print the score of each file in Markdown, and the survivors."""
    print("| file | mutants | killed | equivalent | survived | score |\n|---|---|---|---|---|---|")
    sums = [0, 0, 0, 0]
    survivors = []
    for file, mutants in samples.items():
        known = {(e["before"], e["after"]) for e in equivalent.get(file, [])}
        ran = [m for m in mutants if results.outcome(m)]
        killed = sum(results.outcome(m) == "killed" for m in ran)
        left = [m for m in ran if results.outcome(m) == "survived"]
        same = [m for m in left if (m.before, m.after) in known]
        survivors += [m for m in left if m not in same]
        row = [len(ran), killed, len(same), len(left) - len(same)]
        sums = [a + b for a, b in zip(sums, row)]
        if ran:
            print(f"| `{file}` | {' | '.join(map(str, row))} | {_score(row)} |")
    print(f"| all | {' | '.join(map(str, sums))} | {_score(sums)} |")
    for m in survivors:
        print(f"\n{m.file}:{m.line} {m.operator} ({results.row(m)['tests']} tests)\n- {m.before}\n+ {m.after}")


def _score(row: list[int]) -> str:
    return f"{100 * row[1] / max(1, row[0] - row[2]):.0f}%"


if __name__ == "__main__":
    main()
