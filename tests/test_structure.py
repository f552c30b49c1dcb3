"""The four layers, and how the program starts."""

from __future__ import annotations

import ast
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from emt_cli.app import COMMANDS, EXAMPLES, app

ROOT = Path(__file__).parents[1]
LAYERS = {
    "emt_kernels": ROOT / "kernels" / "emt_kernels",
    "emt": ROOT / "emt",
    "emt_engines": ROOT / "engines" / "emt_engines",
    "emt_cli": ROOT / "emt_cli",
}
EMT = Path(sys.executable).with_name("emt")


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_imports_against_the_arrow(layer):
    """emt_kernels → emt → emt_engines → emt_cli: each layer uses only those before it."""
    order = list(LAYERS)
    above = set(order[order.index(layer) + 1 :])
    files = list(LAYERS[layer].rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & above, path


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
    """Under 0.3 s of processor time: unlike the clock's, it does not count what else the machine is doing."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([EMT, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_without_torch(command):
    done = subprocess.run([sys.executable, "-X", "importtime", EMT, command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout
    assert f"emt {command} " in done.stdout, "the usage and an example name the command"
    assert "| torch" not in done.stderr


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


def test_version():
    done = subprocess.run([EMT, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["emt", "0.1.0"]
