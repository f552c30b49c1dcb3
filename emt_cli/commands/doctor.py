"""`emt doctor`: what of this machine will work, what will not, and the command that mends it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from emt.errors import EmtError
from emt.remote import check_on_disk


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: What was looked at.
        state: `ok`; `limited` if something optional is missing; `broken` if clips cannot be made.
        found: What was found.
        mend: What to type to mend it; empty if nothing is to be mended.
    """

    name: str
    state: str
    found: str
    mend: str = ""


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to look at: model folder or hub id. Default: demo, the small model.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder whose disk is checked for space.")] = Path(
        "out"
    ),
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Cache folder of encoded references and engines. Default: emt in the user's cache folder.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line a finding.")] = False,
) -> None:
    """Check GPU, driver, PyTorch, Triton, TensorRT, compiler, ffmpeg, model, disk and cache.

    Says what will work, what will not, and the command that mends it. Exit code 1 if clips cannot be made.
    """
    from emt_cli.batch.records import dumps
    from emt_cli.text import printable

    for given, option in ((out, "--out"), (cache_dir, "--cache-dir")):
        check_on_disk(given, option)
    findings = examine(model, out, cache_dir)
    if json:
        for finding in findings:
            sys.stdout.buffer.write(dumps(asdict(finding)) + b"\n")
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False)
        for finding in findings:
            style = {"ok": "green", "limited": "yellow", "broken": "red"}[finding.state]
            lines = [*finding.found.splitlines(), *([f"→ {finding.mend}"] if finding.mend else [])]
            text = "\n".join(map(printable, lines))
            table.add_row(Text(finding.state, style), finding.name, Text(text))
        Console().print(table)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def examine(model: str | None = None, out: Path = Path("out"), cache_dir: Path | None = None) -> list[Finding]:
    """Everything that `emt doctor` looks at, in the order of its report."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("driver", _driver),
        ("torch", _torch),
        ("triton", _triton),
        ("tensorrt", _tensorrt),
        ("compiler", _compiler),
        ("ffmpeg", _ffmpeg),
        ("extras", _extras),
        ("model", lambda: _model(model)),
        ("disk", lambda: _disk("disk", out, "--out")),
        ("cache", lambda: _cache(cache_dir)),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except EmtError as error:
            findings.append(Finding(name, "broken", error.problem, error.hint))
        except Exception as error:  # a broken installation can fail in any way; doctor is to find out how
            findings.append(Finding(name, "broken", f"{type(error).__name__}: {error}"))
    return findings


def _python() -> Finding:
    state = "ok" if (3, 10) <= sys.version_info[:2] <= (3, 13) else "broken"
    mend = "" if state == "ok" else "Install Python 3.10 to 3.13."
    return Finding("python", state, f"{platform.python_version()} on {platform.system()} {platform.machine()}", mend)


def _driver() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, PermissionError):  # a folder of PATH that may not be looked into is the latter
        return Finding("driver", "limited", "no NVIDIA driver: clips are made on the CPU, slowly", _GPU_HINT)
    except subprocess.TimeoutExpired:
        return Finding("driver", "broken", "nvidia-smi does not answer", "Restart the machine or its driver.")
    if answer.returncode:
        return Finding("driver", "broken", f"nvidia-smi: {(answer.stderr or answer.stdout).strip()}", _GPU_HINT)
    return Finding("driver", "ok", "; ".join(answer.stdout.strip().splitlines()))


_GPU_HINT = "On a machine with an NVIDIA GPU, install its driver: https://www.nvidia.com/drivers"


def _torch() -> Finding:
    import torch

    version = f"PyTorch {torch.__version__}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        # Seeing a GPU is not enough: a build without kernels for it fails only when it computes.
        torch.ones(2, device="cuda").sum().item()
        return Finding("torch", "ok", f"{version} with CUDA {torch.version.cuda} on {', '.join(names)}")
    if torch.backends.mps.is_available():
        return Finding("torch", "ok", f"{version} with mps")
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        mend = f"{sys.executable} -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
        return Finding("torch", "limited", f"{version} is a build without CUDA, and there is a GPU", mend)
    if shutil.which("nvidia-smi"):
        return Finding(
            "torch", "limited", f"{version} finds no GPU", "See the driver's line, and CUDA_VISIBLE_DEVICES."
        )
    return Finding("torch", "ok", f"{version} on the CPU")


def _version(name: str) -> str | None:
    from emt_engines.fingerprint import installed_versions

    version = installed_versions().get(name)
    return f"{name} {version}" if version else None


def _triton() -> Finding:
    version = _version("triton")
    if version is None:
        return Finding(
            "triton", "limited", "not installed: no fused kernels", f"{sys.executable} -m pip install triton"
        )
    from emt_kernels.selection import unavailable

    if problem := unavailable():
        return Finding("triton", "limited", f"{version}; its kernels are not used, PyTorch computes all: {problem}")
    return Finding("triton", "ok", f"{version}; its kernels are used")


def _tensorrt() -> Finding:
    from emt_engines.products import RTX

    full = _version("tensorrt")
    rtx = _version("tensorrt-rtx")
    if full is None and rtx is None:
        return Finding("tensorrt", "limited", "not installed: no TensorRT engines; PyTorch needs none", RTX.install)
    import torch

    if rtx and torch.cuda.is_available() and RTX.refuses(torch.cuda.get_device_capability()):
        rtx += f" (builds engines, for GPUs of compute capability {RTX.runs}: not this one)"
    elif rtx:
        rtx += f" (engines for GPUs of compute capability {RTX.runs})"
    return Finding("tensorrt", "ok", ", ".join(filter(None, [full, rtx])))


def _compiler() -> Finding:
    import torch

    from emt_engines.toolchain import compiler, missing_compiler, missing_toolkit

    problem = missing_compiler()
    if problem:
        mend = "Install one, such as g++ (apt-get install g++), or name it in CXX."
        return Finding("compiler", "limited", f"{problem}: no inductor engines are built here", mend)
    problem = missing_toolkit() if torch.cuda.is_available() else ""
    if problem:
        return Finding(
            "compiler", "limited", f"{problem}: no inductor engines are built here", "Install CUDA's toolkit."
        )
    return Finding("compiler", "ok", f"{compiler()}: inductor engines can be built")


def _ffmpeg() -> Finding:
    import imageio_ffmpeg

    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        answer = subprocess.run([program, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=20)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        mend = f"{sys.executable} -m pip install --force-reinstall imageio-ffmpeg"
        return Finding("ffmpeg", "broken", f"does not run: {error}", mend)
    missing = [codec for codec in ("libx264", "libvpx-vp9") if codec not in answer.stdout]
    if missing:
        mend = "Unset IMAGEIO_FFMPEG_EXE, or let it name an ffmpeg that has them."
        return Finding("ffmpeg", "broken", f"{program} lacks {', '.join(missing)}", mend)
    return Finding("ffmpeg", "ok", f"{imageio_ffmpeg.get_ffmpeg_version()} at {program}")


#: A module that each extra of the package brings.
_EXTRAS = {
    "evaluate": "cv2",
    "train": "tensorboard",
    "engines": "onnxscript",
    "ray": "ray",
    "s3": "s3fs",
    "gcs": "gcsfs",
    "azure": "adlfs",
}


def _extras() -> Finding:
    there = [name for name, module in _EXTRAS.items() if importlib.util.find_spec(module)]
    missing = [name for name in _EXTRAS if name not in there]
    found = ", ".join(there) or "none"
    if missing:
        found += f"; not installed: {', '.join(missing)} (pip install 'emt-cli[{missing[0]}]')"
    return Finding("extras", "ok", found)


def _model(name: str | None) -> Finding:
    from emt.model_folder import find_model
    from emt_cli.batch.options import Settings, parse_defaults
    from emt_cli.text import size

    model = find_model(name, download=False)
    most = model.facts.max_frames  # of a configuration that makes sense
    weights = sum(path.stat().st_size for path in model.folder.rglob("*.safetensors"))
    count = sum(model.parameters.values()) / 1e6
    made = Settings(**parse_defaults(model.defaults))
    settings = f"{made.frames} frames (at most {most} at once) of {made.width}x{made.height}, {made.steps} steps"
    known = [f"knows {line}" for line in model.vocabulary.lines()] if model.vocabulary else []
    found = f"{model.name}: {count:.0f} M parameters, {size(weights)}; {settings}, guidance {made.guidance:g}"
    return Finding("model", "ok", "\n".join([found, *known]))


def _disk(name: str, folder: Path, option: str) -> Finding:
    import os

    from emt_cli.text import size

    place = next(parent for parent in [folder, *folder.absolute().parents] if os.path.exists(parent))
    free = shutil.disk_usage(place).free
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(name, "broken", f"{place} cannot be written to", f"Name another folder with {option}.")
    if free < 2**30:
        return Finding(
            name, "limited", f"{size(free)} left for {folder}", f"Free some, or use {option} on another disk."
        )
    return Finding(name, "ok", f"{size(free)} left for {folder}")


def _cache(folder: Path | None) -> Finding:
    from emt.cache import MotionCache, default_dir
    from emt_cli.text import size

    folder = folder or default_dir()
    finding = _disk("cache", folder, "--cache-dir")
    try:
        kept = size(MotionCache(folder / "motion", 0).size())
    except OSError:
        return Finding("cache", "limited", f"{folder} cannot be read", "Set XDG_CACHE_HOME to a folder of your own.")
    state = "limited" if finding.state == "broken" else finding.state  # a run goes on without it
    return Finding("cache", state, f"{finding.found}; holds {kept} of encoded references", finding.mend)
