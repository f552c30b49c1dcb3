"""A run of training as seen before it starts: its folder, its checkpoints, and what it needs.

Nothing here imports torch, so that what is missing shows at once and not after everything has been loaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from emt.errors import EmtError
from emt.storage import unwritable

CHECKPOINTS = "checkpoints"
PAIRS_LAYOUT = "It holds a folder for each motion, with clips named <caption>.mp4: `emt make-pairs` writes such a one."


def find_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / CHECKPOINTS).glob("step-*") if (path / "state.json").is_file())


def find_start(run: Path, resume: str | None) -> Path | None:
    """The checkpoint that a value of `--resume` names; None to begin at step 0.

    Args:
        run: Folder of the run.
        resume: "latest", a folder, or None.

    Raises:
        EmtError: there is no such checkpoint.
    """
    if resume == "latest":
        return next(reversed(find_checkpoints(run)), None)
    if resume is not None and not Path(resume).is_dir():
        raise EmtError(f"there is no checkpoint {resume}", f"Give a folder RUN/{CHECKPOINTS}/step-… or latest.")
    return Path(resume) if resume is not None else None


def check_run(pairs: Path, run: Path, resume: Path | None) -> None:
    """Raise EmtError unless a run can begin: on these pairs, in this folder, from this checkpoint.

    Args:
        pairs: Folder of pairs.
        run: Folder to write.
        resume: Checkpoint to go on from.

    Raises:
        EmtError: TensorBoard is not installed, there is no such folder of pairs, or `run` holds another run or cannot
            be written.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise EmtError("TensorBoard is not installed", "Type: pip install 'emt-cli[train]'")
    if not pairs.is_dir():
        raise EmtError(f"{pairs} is not a folder of pairs", PAIRS_LAYOUT)
    if run.resolve() == pairs.resolve():
        raise EmtError(f"{run} is the folder of pairs", "Give another -o RUN: its clips would be taken for pairs.")
    if reason := unwritable(run):
        raise EmtError(f"cannot write to {run}: {reason}", "Give another -o RUN, or check its permissions.")
    found = find_checkpoints(run)
    if resume is None and found:
        raise EmtError(
            f"{run} holds a run, its latest checkpoint is {found[-1].name}",
            "Go on with --resume latest, or give another -o RUN.",
        )
    if resume is not None and any(path.name > resume.name for path in found):
        raise EmtError(
            f"{run} holds a later checkpoint than {resume.name}: {found[-1].name}",
            "Give another -o RUN, or --resume latest.",
        )
