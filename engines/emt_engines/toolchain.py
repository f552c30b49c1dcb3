"""The C++ compiler and CUDA's headers, which PyTorch's compiler builds packages with."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def compiler() -> str:
    """The C++ compiler that PyTorch's compiler calls."""
    return os.environ.get("CXX", "g++")


def missing_compiler() -> str:
    """Fault of this machine's C++ compiler; empty if there is none."""
    return "" if shutil.which(compiler()) else f"there is no C++ compiler ({compiler()})"


def _cuda_home() -> Path | None:
    from torch.utils import cpp_extension

    bundled = Path(sysconfig.get_path("purelib")) / "nvidia" / f"cu{(torch.version.cuda or '').split('.')[0]}"
    candidates = [Path(cpp_extension.CUDA_HOME)] if cpp_extension.CUDA_HOME else []
    return next((home for home in [*candidates, bundled] if (home / "include" / "cuda_runtime_api.h").is_file()), None)


def missing_toolkit() -> str:
    """Missing part of CUDA's headers; empty if there is none."""
    return "" if _cuda_home() else "there are no headers of CUDA's toolkit (set CUDA_HOME to where it is)"


@functools.cache
def links_statically(command: str) -> bool:
    """Return whether a C++ compiler links the C++ library statically, in place of the shared one."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text("#include <string>\nstd::string twice(const std::string& x) { return x + x; }\n")
        made = subprocess.run([command, "-shared", "-fPIC", source, "-o", library], capture_output=True)
        return made.returncode == 0 and b"libstdc++.so" not in library.read_bytes()


def _loaded() -> dict[str, str]:
    """Paths of the shared libraries in this process that a compiler may miss, by the names that it looks for."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return {}
    paths = [line.split(maxsplit=5)[-1] for line in maps.read_text(errors="replace").splitlines() if ".so" in line]
    names = ("libcuda.so", "libstdc++.so")
    found = {name: next((path for path in paths if Path(path).name.startswith(name)), "") for name in names}
    return {name: path for name, path in found.items() if path}


@contextlib.contextmanager
def toolchain(device: str) -> Iterator[None]:
    """Lets PyTorch's compiler find CUDA's headers, and link the libraries that this process has loaded.

    Of the driver's library many places lack the name that a linker looks for. Where a compiler lacks that of the C++
    library, it takes the static one without a word, and the package has a second copy of it inside: which crashes, or
    hangs, as soon as its locales meet those of the first, in the constructor of the package.
    """
    from torch._inductor import config
    from torch.utils import cpp_extension

    home = _cuda_home() if device.startswith("cuda") else None
    if device.startswith("cuda"):
        torch.cuda.init()
    before, found = os.environ.get("LIBRARY_PATH"), cpp_extension.CUDA_HOME
    with tempfile.TemporaryDirectory() as folder:
        loaded = _loaded()
        for name, path in loaded.items():
            (Path(folder) / name).symlink_to(path)
        changes: dict[str, Any] = {}
        if "libstdc++.so" in loaded and links_statically(compiler()):
            # Only folders of the command line are searched before the compiler's own.
            wrapper = Path(folder) / Path(compiler()).name
            wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(shutil.which(compiler()) or "")} -L{folder} "$@"\n')
            wrapper.chmod(0o755)
            changes["cpp.cxx"] = (str(wrapper),)
        if home is not None:
            cpp_extension.CUDA_HOME = str(home)
            paths = [folder, str(home / "lib64"), str(home / "lib"), *([before] if before else [])]
            os.environ["LIBRARY_PATH"] = os.pathsep.join(paths)
        try:
            with config.patch(changes):
                yield
        finally:
            cpp_extension.CUDA_HOME = found
            if before is not None:
                os.environ["LIBRARY_PATH"] = before
            else:
                os.environ.pop("LIBRARY_PATH", None)
