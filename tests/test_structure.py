"""The layers and rooms of the project, and how the program starts."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from emt_cli.commands.group import COMMANDS, EXAMPLES, app

ROOT = Path(__file__).parents[1]
LAYERS = {
    "emt_kernels": ROOT / "kernels" / "emt_kernels",
    "emt": ROOT / "emt",
    "emt_engines": ROOT / "engines" / "emt_engines",
    "emt_cli": ROOT / "emt_cli",
    "emt_comfyui": ROOT / "emt_comfyui",
    "recipes": ROOT / "recipes",
}
EMT = Path(sys.executable).with_name("emt")

#: The rooms of the project, from the bottom up: a module imports from its own row and from those above it in this table
#: alone. Rooms of one row that are separated by `|` know nothing of each other.
ROOMS = """
emt_kernels
emt emt.backbones emt.errors emt.presets emt.demo
emt.prompt_syntax
emt.storage emt.scratch emt.vocabulary emt.hub emt.signatures
emt.video emt.contact_sheet | emt.checkpoints emt.lora_files emt.parts | emt.synthetic
emt.features | emt.evaluate
emt.backbone emt.windows
emt.cache emt.remote emt.shared_cache emt.model_folder | emt.device
emt.backends emt.windowed emt.control | emt.sampling emt.solvers | emt.prompts | emt.text_encoding | emt.importing
emt.diffusers_interface | emt.diffusers_loras
emt.pipeline emt.diffusers_pipeline
emt.backbones.sd15 | emt.backbones.wan21
emt.unet
emt.train
emt_engines
emt_cli emt_cli.text emt_cli.streams emt_cli.messages
emt_cli.batch
emt_cli.config
emt_cli.executors | emt_cli.report | emt_cli.terminal
emt_cli.commands
emt_cli.app
emt_cli.__main__
emt_comfyui
recipes
"""

#: Files that may name a backbone's network or modules: the tables from which it is chosen.
BACKBONE_TABLES = {"emt/__init__.py", "emt/backbone.py", "emt/unet.py"}

#: Modules that answer at once, before anything is computed: they and all that they import leave torch alone.
WITHOUT_TORCH = """
emt emt.errors emt.presets emt.demo emt.prompt_syntax emt.backbone emt.windows emt.storage emt.vocabulary emt.hub
emt.cache emt.remote emt.model_folder emt.device emt.scratch
emt_kernels emt_engines emt_engines.registry emt_engines.choice
emt_cli.app emt_cli.text emt_cli.streams emt_cli.terminal emt_cli.batch.options emt_cli.batch.jobs emt_cli.batch.inputs
emt_cli.batch.journal emt_cli.batch.results emt_cli.batch.estimates emt_cli.batch.planning emt_cli.batch.session
emt_cli.batch.shards emt_cli.executors.choice emt_cli.executors.fleet emt_cli.executors.ray
emt_cli.commands.arguments emt_cli.config emt_cli.messages
"""


@dataclass(frozen=True)
class Import:
    """An import of one module of the project by another, anywhere in its file but under `if TYPE_CHECKING:`."""

    source: str
    target: str
    where: str  # file:line


def modules() -> dict[str, Path]:
    """Every module of the project by its name."""
    found = {}
    for layer, folder in LAYERS.items():
        for path in folder.rglob("*.py"):
            parts = [layer, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A syntax tree without what only type checkers read."""
    yield node
    checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if checked else ast.iter_child_nodes(node):
        yield from run_time_nodes(child)


@functools.cache
def imports() -> list[Import]:
    """All imports between the project's modules, those in function bodies too."""
    known, found = modules(), set()
    for source, path in known.items():
        for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = (source if path.name == "__init__.py" else source.rpartition(".")[0]).split(".")
                base = [*package[: len(package) + 1 - node.level]] if node.level else []
                base = ".".join([*base, *([node.module] if node.module else [])])
                names = [f"{base}.{alias.name}" for alias in node.names]
            for name in names:
                while name and name not in known:  # a name in a module, or another project's
                    name = name.rpartition(".")[0]
                if name and name != source:
                    found.add(Import(source, name, f"{path.relative_to(ROOT)}:{node.lineno}"))
    return sorted(found, key=lambda found: found.where)


def rooms() -> list[list[list[str]]]:
    """The rows of the table; a row's rooms, which know nothing of each other; a room's packages and modules."""
    return [[room.split() for room in row.split("|")] for row in ROOMS.strip().splitlines()]


def place(module: str) -> tuple[int, int]:
    """The row and the room of a module: those of the longest name in the table that it begins with."""
    names = {name: (r, i) for r, row in enumerate(rooms()) for i, room in enumerate(row) for name in room}
    # A package that the table divides stands for its own __init__.py alone: a new module in it needs a room.
    divided = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    fits = [n for n in names if module == n or (module.startswith(f"{n}.") and n not in divided)]
    assert fits, f"{module} is in no room: add it to ROOMS"
    return names[max(fits, key=len)]


def allowed(module: str) -> str:
    """Where a module may import from, for a message."""
    row, room = place(module)
    names = [name for above in rooms()[:row] for room in above for name in room] + rooms()[row][room]
    layer = module.partition(".")[0]
    here = [name for name in names if name.partition(".")[0] == layer]
    below = dict.fromkeys(name.partition(".")[0] for name in names if name not in here)
    return f"{', '.join(here)}{' and all of ' if below else ''}{', '.join(below)}"


def test_every_module_is_in_a_room():
    for module in modules():
        place(module)


def test_the_project_uses_modules_not_the_names_that_the_package_lends():
    """`from emt import MotionTransferPipeline` is for users: inside, it would hide which room is entered."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "emt" and not node.level:
                lent = {alias.name for alias in node.names if f"emt.{alias.name}" not in modules()} - {"__version__"}
                assert not lent, f"{path.relative_to(ROOT)}:{node.lineno} imports {lent} of emt: name their module"


def test_nothing_imports_against_the_arrows():
    wrong = []
    for found in imports():
        source, target = place(found.source), place(found.target)
        if target[0] > source[0] or (target[0] == source[0] and target != source):
            wrong.append(f"{found.where} imports {found.target}; {found.source} may import: {allowed(found.source)}")
    assert not wrong, "\n".join(wrong)


def circles(edges: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or by way of others."""
    after: dict[str, set[str]] = {}
    for source, target in edges:
        after.setdefault(source, set()).add(target)
    reached: dict[str, set[str]] = {}
    for module in after:
        waiting = [module]
        reached[module] = set()
        while waiting:
            new = after.get(waiting.pop(), set()) - reached[module]
            reached[module] |= new
            waiting += new
    found = {frozenset(other for other in reached[m] if m in reached.get(other, ())) for m in after if m in reached[m]}
    return [set(circle) for circle in found]


def test_no_modules_import_each_other():
    """Not by way of others either, nor in function bodies, where a circle does no harm until somebody moves a line."""
    for circle in circles((i.source, i.target) for i in imports()):
        lines = [f"{i.where} imports {i.target}" for i in imports() if {i.source, i.target} <= circle]
        pytest.fail("a circle of imports:\n" + "\n".join(lines))


def test_a_circle_is_found_wherever_it_hides():
    assert circles([("a", "b"), ("b", "c"), ("d", "a")]) == []
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]) == [{"a", "b", "c"}]
    code = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    from c import d\n"
    found = [node for node in run_time_nodes(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in found] == ["import b", "from c import d"]


def test_a_backbone_is_chosen_from_a_table_and_known_nowhere_else():
    """Of the libraries and the program; a recipe trains one network and may name it."""
    networks = r"\bMotionTransferUNet\b|\bemt\.backbones\.\w+|\bfrom emt\.backbones import"
    inside = ROOT / "emt" / "backbones"
    for module, path in modules().items():
        name = path.relative_to(ROOT).as_posix()
        if inside in path.parents or name in BACKBONE_TABLES or module.startswith("recipes"):
            continue
        found = re.search(networks, path.read_text(encoding="utf-8"))
        assert not found, f"{name} names {found[0]}: ask emt.backbone, which {BACKBONE_TABLES} fill"


@pytest.mark.parametrize("module", WITHOUT_TORCH.split())
def test_what_needs_no_torch_imports_none(module):
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["plan", "disc.mp4", "--prompt", "x", "--model", "model"], ["report", "out"]])
def test_a_plan_and_a_report_need_no_torch(tmp_path, arguments):
    written = Path(__file__).parent / "data" / "version_0_1"
    folder = shutil.copytree(written, tmp_path / "folder")
    code = "import sys; sys.modules['torch'] = None; from emt_cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['emt', '--help']\n"
        "from emt_cli.app import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'rich', 'PIL', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout


def test_help_answers_at_once():
    """A fifth of a second, which is that of the parser's library: half more is the most that all else may take.

    In processor time: unlike the clock's, it does not count what else the machine is doing.
    """

    def seconds(*command: object) -> float:
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(times)

    assert seconds(EMT, "--help") < 1.5 * seconds(sys.executable, "-c", "import typer")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_without_torch(command):
    line = [sys.executable, "-X", "importtime", EMT, command, "--help"]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert command in done.stdout
    assert f"emt {command} " in done.stdout, "the usage and an example name the command"
    assert "| torch" not in done.stderr
    assert "<bool>" not in done.stdout, "types of Python"
    main = typer.main.get_command(app)
    with main.make_context("emt", [command]) as root:
        options = main.get_command(root, command).params
    for word in " ".join(getattr(option, "help", None) or "" for option in options).replace("\\[", "[").split():
        assert word in done.stdout, "neither cut off by 80 columns nor taken for markup"


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_example_of_every_command_is_read_by_its_parser(command):
    """Options that an example names exist and take such values; nothing is run."""
    main = typer.main.get_command(app)
    with main.make_context("emt", shlex.split(EXAMPLES[command])[1:2]) as root:
        parser = main.get_command(root, command)
        assert parser.make_context(command, shlex.split(EXAMPLES[command])[2:], parent=root)


@pytest.mark.parametrize("arguments", [["no-such-command"], ["--no-such-option"], ["transfer", "--no-such-option"]])
def test_bad_usage_is_exit_code_2(arguments):
    done = subprocess.run([EMT, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert not done.stdout
    assert arguments[-1] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", [[EMT], [sys.executable, "-m", "emt_cli"]])
def test_version(program):
    done = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["emt", "0.1.0"]


def test_docstrings_begin_with_a_verb_or_a_noun():
    """Not with what, how, where or whether: a reader wants to know what a thing is or does."""
    questions = re.compile(r"(What|How|Where|Whether|Who|Why|When|Within|See that|Say whether)\b")
    for path in sorted(path for layer in LAYERS.values() for path in layer.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert not questions.match(ast.get_docstring(node) or ""), f"{path}:{getattr(node, 'lineno', 1)}"


def test_the_files_of_the_mutation_run_are_there():
    settings = json.loads((ROOT / "benchmarks" / "mutants.json").read_text(encoding="utf-8"))
    named = {
        *settings["tests"],
        *settings["equivalent"],
        *(test for tests in settings["tests"].values() for test in tests),
    }
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
