"""What is published: the dependencies that are declared, and the source archive."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {
    "emt": "emt",
    "emt_cli": "emt_cli",
    "emt_comfyui": "emt_comfyui",
    "emt_kernels": "kernels/emt_kernels",
    "emt_engines": "engines/emt_engines",
}
#: Distributions that are called otherwise than what is imported.
CALLED = {"PIL": "pillow", "cv2": "opencv-python-headless"}
#: Brought by what is declared: triton by builds of torch for GPUs, and done without elsewhere; aiohttp by fsspec[http];
#: typing_extensions, which type checkers read, by torch; psutil by accelerate; comfy is ComfyUI, which runs its nodes.
BROUGHT = {"triton", "aiohttp", "typing-extensions", "psutil", "comfy"}


def declared(requirements: list[str]) -> set[str]:
    """Names of distributions, as pip compares them."""
    return {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in requirements}


def imported(nodes: list[ast.stmt] | ast.AST, *, anywhere: bool) -> set[str]:
    """Distributions that code imports: anywhere in it, or as soon as it is imported itself."""
    names = set()
    for node in ast.walk(nodes) if anywhere else ast.iter_child_nodes(nodes):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    names -= {*sys.stdlib_module_names, *PACKAGES}
    return {CALLED.get(name, name).lower().replace("_", "-") for name in names}


def test_every_library_that_is_imported_is_declared():
    """At the top of a module it is there on every machine; in a function an extra may bring it."""
    base = declared(PROJECT["dependencies"])
    every = base | {name for extra in PROJECT["optional-dependencies"].values() for name in declared(extra)}
    for package in PACKAGES.values():
        for path in (ROOT / package).rglob("*.py"):
            code = ast.parse(path.read_text(encoding="utf-8"))
            assert not imported(code, anywhere=False) - base, path
            assert not imported(code, anywhere=True) - every - BROUGHT, path


def test_every_module_is_imported_without_the_extras():
    """And without triton, which builds of torch for CPUs lack."""
    code = """
        import importlib, pkgutil, sys
        for name in sys.argv[1].split():
            sys.modules[name] = None
        for package in sys.argv[2].split():
            for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
                importlib.import_module(module.name)
    """
    libraries = "triton cv2 matplotlib tensorboard onnx onnxscript onnxruntime tensorrt tensorrt_rtx"
    command = [sys.executable, "-c", textwrap.dedent(code), libraries, " ".join(PACKAGES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_package_is_typed():
    for folder in PACKAGES.values():
        assert (ROOT / folder / "py.typed").is_file(), folder


def test_the_source_archive_has_all_that_the_tests_need(tmp_path):
    pytest.importorskip("setuptools", "77")

    def passed_over(folder: str, names: list[str]) -> set[str]:
        """Caches everywhere; and at the top what is the working tree's own, hidden or made by a run."""
        own = {"build", "dist", "out", "runs"} | {name for name in names if name[0] == "." and name != ".ci"}
        return {name for name in names if name == "__pycache__" or name.endswith(".egg-info")} | (
            own if Path(folder) == ROOT else set()
        )

    source = shutil.copytree(ROOT, tmp_path / "source", ignore=passed_over)
    before = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    code = "import setuptools.build_meta as backend; backend.build_sdist('../dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [archive] = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert not before - names
