"""Writing of model folders: they appear under their names whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from emt.errors import EmtError, first_line
from emt.storage import sync, sync_tree


@contextmanager
def new_folder(output: Path, overwrite: bool, inputs: Sequence[str | Path | None] = ()) -> Iterator[Path]:
    """Context manager: a folder to write into, renamed to `output` once it is complete and on disk.

    Raises:
        EmtError: if `output` exists and may not be replaced, if another process is writing it, or if writing fails.
    """
    output = output.resolve()
    in_use = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if in_use and not overwrite:
        raise EmtError(f"{output} exists", "Give another -o FOLDER, or --overwrite to replace it.")
    if in_use and not (output / "model_index.json").is_file():
        raise EmtError(f"{output} is not a model folder and is not replaced", "Give another -o FOLDER.")
    inside = [
        str(x) for x in inputs if x is not None and Path(x).exists() and output in [p := Path(x).resolve(), *p.parents]
    ]
    if in_use and inside:
        raise EmtError(f"{output} holds what is imported: {', '.join(inside)}", "Give another -o FOLDER.")
    partial, replaced = (output.with_name(f".{output.name}.{kind}") for kind in ("partial", "replaced"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        # The lock goes with the process that holds it: what a killed import left can be told from one at work.
        lock = os.open(partial, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EmtError(f"{output} is being written by another import", "Wait for it to end.") from error
            try:
                _empty(partial)
                yield partial
                sync_tree(partial)
                if in_use:
                    shutil.rmtree(replaced, ignore_errors=True)
                    output.rename(replaced)
                partial.rename(output)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                if replaced.exists() and not output.exists():
                    replaced.rename(output)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
            sync(output.parent)
        finally:
            os.close(lock)
    except (OSError, SafetensorError) as error:
        raise EmtError(
            f"{output} cannot be written: {first_line(error)}", "Check the free space and permissions."
        ) from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def model_card(title: str, text: str) -> str:
    """The README.md of a model folder, with the front matter that model hubs read."""
    return (
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-video\ntags:\n- motion-transfer\n---\n\n"
        f"# {title}\n\n{text}\n\n"
        "```python\nfrom emt.pipeline import MotionTransferPipeline\n\n"
        'pipe = MotionTransferPipeline.from_pretrained("this folder or its hub id")\n```\n'
    )
