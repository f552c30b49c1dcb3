"""The C++ compiler and CUDA's headers, which PyTorch's compiler builds packages with."""

from __future__ import annotations

import contextlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch


def compiler() -> str:
    """The C++ compiler that PyTorch's compiler calls."""
    return os.environ.get("CXX", "g++")


def missing_compiler() -> str:
    """What is wrong with this machine's C++ compiler; empty if nothing is."""
    return "" if shutil.which(compiler()) else f"there is no C++ compiler ({compiler()})"


def _cuda_home() -> Path | None:
    from torch.utils import cpp_extension

    bundled = Path(sysconfig.get_path("purelib")) / "nvidia" / f"cu{(torch.version.cuda or '').split('.')[0]}"
    candidates = [Path(cpp_extension.CUDA_HOME)] if cpp_extension.CUDA_HOME else []
    return next((home for home in [*candidates, bundled] if (home / "include" / "cuda_runtime_api.h").is_file()), None)


def missing_toolkit() -> str:
    """What is missing of CUDA's headers; empty if nothing is."""
    return "" if _cuda_home() else "there are no headers of CUDA's toolkit (set CUDA_HOME to where it is)"


@contextlib.contextmanager
def toolchain(device: str) -> Iterator[None]:
    """Lets the compiler find CUDA's headers, and the driver's library, which only its own name lacks in many places."""
    home = _cuda_home() if device.startswith("cuda") else None
    if home is None:
        yield
        return
    from torch.utils import cpp_extension

    torch.cuda.init()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    driver = next((line.split()[-1] for line in maps.splitlines() if "libcuda.so" in line), None)
    before, found = dict(os.environ), cpp_extension.CUDA_HOME
    with tempfile.TemporaryDirectory() as folder:
        if driver:
            (Path(folder) / "libcuda.so").symlink_to(driver)
        cpp_extension.CUDA_HOME = str(home)
        paths = [folder, str(home / "lib64"), str(home / "lib"), *before.get("LIBRARY_PATH", "").split(os.pathsep)]
        os.environ["LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
        try:
            yield
        finally:
            cpp_extension.CUDA_HOME = found
            if "LIBRARY_PATH" in before:
                os.environ["LIBRARY_PATH"] = before["LIBRARY_PATH"]
            else:
                del os.environ["LIBRARY_PATH"]
