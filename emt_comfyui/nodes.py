"""Nodes: load a model, load a reference, transfer its motion, and run a batch.

They follow ComfyUI's documented interface: a class with `INPUT_TYPES`, `RETURN_TYPES`, `FUNCTION` and `CATEGORY`, whose
images are tensors (frames, height, width, channels) of floats from 0 to 1. ComfyUI imports this module when it starts:
torch and the networks wait for the first run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from emt import demo
from emt.errors import EmtError
from emt_cli.batch.options import Fit, Method, Precision, Scheduler

if TYPE_CHECKING:
    from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

CATEGORY = "emt"
MODEL = "EMT_MODEL"
DEFAULT = "the model's"
_SIDE = {"min": 0, "max": 4096, "step": 8}


def _outside_inference_mode(node: F) -> F:
    """Decorator: leave the inference mode that ComfyUI runs nodes in, whose tensors have no gradients, ever after."""

    @functools.wraps(node)
    def run(*arguments: Any, **options: Any) -> Any:
        import torch

        with torch.inference_mode(False):
            return node(*arguments, **options)

    return run  # type: ignore[return-value]


def _names(kind: Any) -> list[str]:
    return [str(member.value) for member in kind]


class LoadModel:
    """Opens a model folder, hub id or URL; `demo` is the small model that comes with the package."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "Opens a model of emt: a folder that `emt import-weights` has made, a hub id, or demo."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs by name."""
        return {
            "required": {
                "model": ("STRING", {"default": demo.NAME, "tooltip": "Model folder, hub id, or demo."}),
                "device": ("STRING", {"default": "auto", "tooltip": "auto, cuda, cuda:N, mps or cpu."}),
                "precision": (_names(Precision), {"default": "auto", "tooltip": "auto: fp16 on a GPU, fp32 on a CPU."}),
            }
        }

    @_outside_inference_mode
    def load(self, model: str, device: str, precision: str) -> tuple[Any]:
        """Open the model.

        Raises:
            EmtError: there is no such model or device.
        """
        from emt.device import Device
        from emt.model_folder import find_model
        from emt.pipeline import load_pipeline

        opened, found = Device.open(device, precision), find_model(model, download=True)
        pipe = load_pipeline(found.folder, opened.torch_device, opened.dtype)
        pipe.set_progress_bar_config(disable=True)
        return (pipe,)


class LoadReference:
    """Reads a clip as `emt transfer` reads references; its frames are images."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("reference", "fps")
    DESCRIPTION = "Reads frames of a video, an animated picture or a folder of pictures, spread evenly over it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs by name."""
        return {
            "required": {
                "path": ("STRING", {"default": "", "tooltip": "Video, GIF, or folder of pictures."}),
                "frames": ("INT", {"default": 16, "min": 2, "max": 2048}),
                "width": ("INT", {"default": 512, "min": 8, "max": 4096, "step": 8}),
                "height": ("INT", {"default": 512, "min": 8, "max": 4096, "step": 8}),
                "fit": (_names(Fit), {"default": "crop"}),
            },
            "optional": {
                "start": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1e6, "step": 0.1, "tooltip": "Seconds."}),
                "duration": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1e6, "step": 0.1, "tooltip": "0: all."}),
                "stride": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: spread evenly."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, path: str | None = None, **others: Any) -> str | float:
        """Times and sizes of a clip's files, which tell it apart from one that takes its place.

        Of a path that another node makes nothing is known here (`path` is None): then its value decides.
        """
        if path is None:
            return ""
        if not os.path.exists(path):
            return float("nan")
        files = [Path(path), *(sorted(Path(path).iterdir()) if os.path.isdir(path) else [])]
        stats = [(file.name, file.stat()) for file in files]
        return repr([(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats])

    @classmethod
    def VALIDATE_INPUTS(cls, path: str | None = None) -> bool | str:
        """True, or why the clip cannot be read, before anything runs; `path` is None where another node makes it."""
        return True if path is None or os.path.exists(path) else f"there is no file or folder {path!r}"

    def load(
        self,
        path: str,
        frames: int,
        width: int,
        height: int,
        fit: str,
        start: float = 0.0,
        duration: float = 0.0,
        stride: int = 0,
    ) -> tuple[Tensor, float]:
        """Read the frames.

        Raises:
            EmtError: the clip cannot be read, or has too few.
        """
        from emt.video import read_clip

        size: Any = (width, height)
        part: Any = {"start": start, "duration": duration or None, "stride": stride or None}
        clip = read_clip(path, frames=frames, size=size, fit=fit, **part)  # type: ignore[arg-type]
        return _images(clip.frames), clip.fps


class TransferMotion:
    """Makes a clip that moves as the reference does and shows what the prompt says."""

    CATEGORY = CATEGORY
    FUNCTION = "transfer"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("clip",)
    DESCRIPTION = "Makes a clip that moves as the reference does and shows what the prompt says."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs by name."""
        return {
            "required": {
                "model": (MODEL,),
                "reference": ("IMAGE", {"tooltip": "Frames of any size; they are spread evenly and cropped."}),
                "prompt": ("STRING", {"default": "a yellow penguin in the desert", "multiline": True}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
            },
            "optional": {
                "negative_prompt": ("STRING", {"default": "", "multiline": True}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 500, "tooltip": "0: the model's."}),
                "guidance": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 50.0, "step": 0.5, "tooltip": "0: the model's."},
                ),
                "scheduler": ([DEFAULT, *_names(Scheduler)], {"default": DEFAULT}),
                "method": ([DEFAULT, *_names(Method)], {"default": DEFAULT}),
                "frames": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2048, "tooltip": "0: the model's, as far as there are."},
                ),
                "width": ("INT", {"default": 0, **_SIDE, "tooltip": "0: the model's."}),
                "height": ("INT", {"default": 0, **_SIDE, "tooltip": "0: the model's."}),
            },
        }

    @_outside_inference_mode
    def transfer(
        self,
        model: Any,
        reference: Tensor,
        prompt: str,
        seed: int,
        negative_prompt: str = "",
        steps: int = 0,
        guidance: float = 0.0,
        scheduler: str = DEFAULT,
        method: str = DEFAULT,
        frames: int = 0,
        width: int = 0,
        height: int = 0,
    ) -> tuple[Tensor]:
        """Make the clip.

        Raises:
            EmtError: the reference has too few frames, the prompt has words that the model does not know, or the
                result is not finite.
            ValueError: the model makes no clips of this shape.
        """
        from emt.train.teacher import Teacher
        from emt.video.frames import sample_frames

        config = model.config
        size = (width or config.width, height or config.height)
        count = frames or min(config.frames, len(reference))
        if count > len(reference):
            raise EmtError(f"frames is {count}, the reference has {len(reference)}", "Set frames to 0, or load more.")
        motion = model.extract_motion(sample_frames(_pixels(reference), count, size))
        own = config.get("sampler", "ddim")
        options: dict[str, Any] = {
            "seed": seed,
            "negative_prompt": negative_prompt,
            "steps": steps or None,
            "guidance": guidance or None,
            "scheduler": own if scheduler == DEFAULT else scheduler,
            "on_step": _progress(),
        }
        trained = config.get("adapter") != "none"
        if method == Method.GUIDANCE.value or (method == DEFAULT and not trained):
            return (_images(Teacher(model).generate(prompt, motion, **options)[0]),)
        if not trained:
            raise EmtError("this model has no trained adapter: it was imported without one", "Set method to guidance.")
        return (_images(model.generate(prompt, motion, **options)[0]),)


class RunBatch:
    """Runs `emt transfer` over many references and prompts; finished clips are skipped, so it can be run again."""

    CATEGORY = CATEGORY
    FUNCTION = "run"
    RETURN_TYPES = ("STRING", "INT")
    RETURN_NAMES = ("clips", "count")
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Every reference with every prompt and seed, by `emt transfer`: resumable, with a record of each clip."
    )

    #: The program, in a process of its own: it takes signals, which a server's threads cannot, and gives the GPU back.
    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "emt_cli")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs by name."""
        return {
            "required": {
                "references": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "Clips, folders, globs: one a line."},
                ),
                "prompts": ("STRING", {"default": "", "multiline": True, "tooltip": "One a line."}),
                "out": ("STRING", {"default": "out", "tooltip": "Output folder."}),
                "model": ("STRING", {"default": demo.NAME, "tooltip": "Model folder, hub id, or demo."}),
            },
            "optional": {
                "seeds": ("STRING", {"default": "0", "tooltip": "Numbers and ranges, as in 0,7,10-15."}),
                "options": ("STRING", {"default": "", "tooltip": "More options of emt transfer, as in a shell."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        """Never equal to itself: a folder may have new clips."""
        return float("nan")

    def run(
        self, references: str, prompts: str, out: str, model: str, seeds: str = "0", options: str = ""
    ) -> tuple[str, int]:
        """Run it to its end: paths of the clips, one a line, and how many there are.

        Raises:
            EmtError: the options make no sense, or a job failed; says what the program said.
        """
        import shlex

        given = [line.strip() for line in references.splitlines() if line.strip()]
        texts = [part for line in prompts.splitlines() if line.strip() for part in ("--prompt", line.strip())]
        named = ["--out", out, "--model", model, "--seeds", seeds, "--json"]
        try:
            more = shlex.split(options)
        except ValueError as error:
            raise EmtError(f"options are {options!r}: {error}", "Give them as in a shell, quotes in pairs.") from error
        arguments = [*self.command, "transfer", *named, *texts, *more, "--", *given]
        code, said, complaints = _run(arguments)
        lines = [json.loads(line) for line in said.splitlines()]
        failed = [line for line in lines if line.get("state") == "failed"]
        if failed:
            hint = f"{len(lines) - len(failed)} of {len(lines)} jobs are done; run it again for the others."
            raise EmtError(f"{failed[0].get('reference', '')}: {failed[0].get('error', '')}", hint)
        if code:
            raise EmtError(complaints.strip() or f"emt transfer ended with code {code}")
        clips = [str(line["path"]) for line in lines if line.get("path")]
        return "\n".join(clips), len(clips)


def _run(command: Sequence[str]) -> tuple[int, str, str]:
    """Exit code and standard streams of a program, which ends after its batch where ComfyUI's user interrupts."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        check = _interruption()
        try:
            while process.poll() is None:
                check()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    return process.returncode, texts[0], texts[1]


def _interruption() -> Callable[[], None]:
    """ComfyUI's own check, which raises where its user has pressed Cancel; outside of it, nothing."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
    except ImportError:
        return lambda: None
    return throw_exception_if_processing_interrupted  # type: ignore[no-any-return]


def _pixels(images: Tensor) -> Any:
    """RGB, uint8, (frames, height, width, 3), of ComfyUI's images; alpha is left out."""
    return (images[..., :3].detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def _images(frames: Any) -> Tensor:
    """ComfyUI's images of RGB, uint8, (frames, height, width, 3)."""
    import torch

    return torch.from_numpy(frames).float() / 255


def _progress() -> Callable[[int, int], None] | None:
    """Shows steps in ComfyUI, and ends where its user interrupts; None outside of it."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    bar: list[Any] = []
    check = _interruption()

    def show(done: int, steps: int) -> None:
        check()
        if not bar:
            bar.append(ProgressBar(steps))
        bar[0].update_absolute(done, steps)

    return show


NODE_CLASS_MAPPINGS = {
    "EMTLoadModel": LoadModel,
    "EMTLoadReference": LoadReference,
    "EMTTransferMotion": TransferMotion,
    "EMTRunBatch": RunBatch,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "EMTLoadModel": "Load motion transfer model",
    "EMTLoadReference": "Load reference clip",
    "EMTTransferMotion": "Transfer motion",
    "EMTRunBatch": "Transfer motion (batch)",
}
