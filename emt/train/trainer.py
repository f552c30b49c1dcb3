"""Training of the adapter on pairs of clips: `emt train` (EfficientMT, section 3.4).

Whatever is random in a step is drawn from generators seeded by the run's seed and the step's number, and the order of
the pairs follows from them too: the state of a run is its weights, their average, the optimizer's moments and the step.
A run resumed from a checkpoint repeats the steps of one that was never interrupted, to the bit.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from emt.backbone import PUBLISHED, Backbone, module_of
from emt.checkpoints import check_keys
from emt.contact_sheet import contact_sheet
from emt.errors import EmtError, first_line
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.storage import apply_umask, new_folder, partial_file, remove_partials, sync
from emt.train.data import PairDataset, Sample, TrainingPair, find_pairs, seeded, write_text
from emt.train.latents import LatentCache
from emt.train.objective import FlowObjective, Objective, adapter_loss, objective_of
from emt.train.run_folder import CHECKPOINTS, check_run, find_checkpoints

MAX_SKIPPED = 20
"""Steps in a row whose loss is not finite, after which a run fails."""
MAX_GRADIENT = 1.0
"""Norm at which gradients are clipped, as AnimateDiff's training does."""
SHEET_CLIPS = 4
"""Pairs of a sample sheet."""
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError)
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class TrainingSettings:
    """Training options; the defaults are the published ones.

    Attributes:
        steps: Of the optimizer.
        batch_size: Pairs at once on each device.
        accumulate: Batches of a step.
        learning_rate: Of AdamW.
        drop_text: Share of captions replaced by the empty one, for guidance.
        precision: "fp32", or "bf16" for autocast around weights that stay in float32.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        ema_decay: Of the averaged weights, from which the result is made; reached by (1 + n) / (10 + n).
        seed: Of the order of the pairs and of all noise.
        checkpoint_every: Steps.
        keep: Checkpoints that stay, the latest ones.
        sample_every: Steps between sample sheets; 0 for none.
        workers: Processes that decode clips, on each device; 0 decodes between the steps.
    """

    steps: int = 50_000
    batch_size: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-4
    drop_text: float = 0.1
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    ema_decay: float = 0.9999
    seed: int = 0
    checkpoint_every: int = 1000
    keep: int = 3
    sample_every: int = 1000
    workers: int = 4


_FREE = ("steps", "checkpoint_every", "keep", "sample_every", "workers", "gradient_checkpointing")
"""Settings that leave the losses of a resumed run as they are."""


class _Loss(nn.Module):
    """`adapter_loss` as the forward pass of a module, which is what data parallelism wraps."""

    def __init__(
        self,
        unet: Backbone,
        objective: Objective | FlowObjective,
        reference_timestep: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.unet, self.objective, self.reference_timestep = unet, objective, reference_timestep
        self.autocast = autocast

    def forward(self, **batch: Tensor) -> Tensor:
        with self.autocast():
            return adapter_loss(self.unet, self.objective, reference_timestep=self.reference_timestep, **batch)


def published(network: str, name: str) -> str:
    """The name of an adapter weight in EfficientMT's published files; of another network than theirs, its own."""
    return name.replace(".adapter.", ".") if network == PUBLISHED else name


class Trainer:
    """A run of training, from its first step or from a checkpoint on.

    Args:
        model: Model folder.
        pairs: Folder of pairs (`emt.train.data`).
        run: Folder to write.
        settings: How to train.
        resume: Checkpoint to go on from.
        say: Called with what the user should know, a line at a time.

    Raises:
        EmtError: If something cannot be used: the model, all pairs, the checkpoint, the folder; or TensorBoard lacks.
    """

    def __init__(
        self,
        model: Path,
        pairs: Path,
        run: Path,
        settings: TrainingSettings,
        *,
        resume: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        check_run(pairs, run, resume)
        from torch.utils.tensorboard import SummaryWriter

        self.model, self.run, self.settings = model, run, settings
        # Without a GPU, processes that were started together would each train alone, in one folder, if not told.
        cpu = not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1
        # Autocast is our own: accelerate allows one precision in the life of a process.
        self.accelerator = Accelerator(mixed_precision="no", cpu=cpu)
        main = self.accelerator.is_main_process
        self._say_here = say
        self.say: Callable[[str], None] = say if main else lambda text: None
        self.pipe: MotionTransferPipeline = load_pipeline(model, self.accelerator.device)
        for part in (self.pipe.vae, self.pipe.text_encoder, self.pipe.unet):
            if part is not None:  # a large text encoder is opened apart
                part.requires_grad_(False)
        config = self.pipe.config
        self.dataset = PairDataset(
            find_pairs(pairs, self.say, self.pipe.check_words),
            frames=config.frames,
            size=(config.width, config.height),
            seed=settings.seed,
        )
        self._bad: set[str] = set()
        self.first = self._first_pairs()
        unet = self.pipe.unet
        streams = self.pipe.codec.streams
        if settings.precision == "bf16" and self.accelerator.device.type == "cuda" and not streams:
            self.pipe.vae.half()  # three bits more than bfloat16 has
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()

        self.trained = dict(unet.adapter_parameters())
        if not self.trained:
            raise EmtError(f"{model} has no adapter to train", "Make a model folder with: emt import-weights --help")
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.objective = objective_of(self.pipe.scheduler, self.accelerator.device)
        self._timesteps = objective_of(self.pipe.scheduler)
        #: Latents of an autoencoder of video are the same every time: they are computed once in a run.
        self._latents = LatentCache(run / "latents", model / "vae") if streams else None
        self._encode_captions()
        with torch.no_grad():
            self.empty_text = self.pipe.encode_prompts([""])
        self.loss = self.accelerator.prepare(_Loss(unet, self.objective, config.reference_timestep, self._autocast))
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=settings.learning_rate)
        self.ema = EMAModel(self.trained.values(), decay=settings.ema_decay, foreach=True)
        self.step = self.skipped = self._skipped_in_a_row = 0
        if resume is not None:
            self._load(resume)
        self._cut_log()
        self.board = SummaryWriter(run / "tensorboard", purge_step=self.step + 1) if main else None

    def _encode_captions(self) -> None:
        """Encode all captions by a text encoder that is too large to stay open, by one process after another."""
        if self.pipe.prompt_encoder is not None:
            captions = {pair.caption for pair in self.dataset.pairs} | {""}
            with self.accelerator.main_process_first():
                self.pipe.prompt_encoder.encode(sorted(captions), self.accelerator.device)

    def _encode(self, frames: np.ndarray, generator: torch.Generator) -> Tensor:
        """Latents of a clip, (1, channels, latent frames, …)."""
        if self._latents is None:
            return self.pipe.encode_frames(frames, generator)
        latents = self._latents.get(frames, lambda: self.pipe.encode_frames(frames, generator))
        return latents.to(self.accelerator.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        bf16 = self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16)

    # ------------------------------------------------------------------------------------------------------ the data

    def _first_pairs(self) -> list[Sample]:
        """Decode what sample sheets show, the first pair of each motion; fails if no pair can be used."""
        motions: dict[Path, TrainingPair] = {}
        for pair in self.dataset.pairs:
            motions.setdefault(pair.target.parent, pair)
        chosen = PairDataset(
            list(motions.values())[:SHEET_CLIPS], frames=self.dataset.frames, size=self.dataset.size, seed=0
        )
        try:
            # A pair that cannot be used is replaced by another of these: each is shown once.
            decoded = [chosen[place] for place in range(len(chosen.pairs))]
            samples = list({sample.pair: sample for sample in decoded}.values())
        except EmtError:  # none of these: the run's own order finds others, or fails
            samples = [self.dataset[0]]
        return sorted(samples, key=lambda sample: sample.pair.target)

    def _places(self) -> Iterator[list[int]]:
        """The places in the order of the pairs that this process' batches take, from the current step on."""
        s, processes = self.settings, self.accelerator.num_processes
        for batch in range(self.step * s.accumulate, s.steps * s.accumulate):
            first = (batch * processes + self.accelerator.process_index) * s.batch_size
            yield list(range(first, first + s.batch_size))

    def _batches(self) -> Iterator[list[Sample]]:
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=self._places(),  # type: ignore[arg-type]  # any iterable serves
                collate_fn=list,
                num_workers=self.settings.workers,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),
            )
        )

    @torch.no_grad()
    def prepare(self, samples: list[Sample], step: int, part: int) -> dict[str, Tensor]:
        """The tensors of a batch: latents, text, timesteps and noise, as `adapter_loss` takes them.

        Args:
            samples: Decoded pairs.
            step: That the batch is of.
            part: Which of the step's batches.
        """
        generator = seeded(self.settings.seed, step, part, self.accelerator.process_index)
        captions = [sample.pair.caption for sample in samples]
        dropped = torch.rand(len(samples), generator=generator) < self.settings.drop_text
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions)]
        timestep = self._timesteps.sample_timesteps(len(samples), generator)
        target = torch.cat([self._encode(sample.target, generator) for sample in samples])
        reference = torch.cat([self._encode(sample.reference, generator) for sample in samples])
        noise, reference_noise = torch.randn(2, *target.shape, generator=generator).to(target)
        return {
            "reference": reference,
            "target": target,
            "text": self.pipe.encode_prompts(captions),
            "empty_text": self.empty_text,
            "timestep": timestep.to(target.device),
            "noise": noise,
            "reference_noise": reference_noise,
        }

    # ----------------------------------------------------------------------------------------------------- the steps

    def train(
        self, stop: Callable[[], bool] = lambda: False, on_step: Callable[[dict[str, Any]], None] = lambda record: None
    ) -> bool:
        """Train to the last step, or until `stop` says so; saves a checkpoint and, at the end, the result.

        Args:
            stop: Asked after each step.
            on_step: Called after each step with its record: step, loss, grad_norm, skipped, steps_per_second, and on a
                GPU peak_gib.

        Returns:
            Whether the last step was reached.

        Raises:
            EmtError: If the loss is not finite for many steps, or the disk is full.
        """
        s = self.settings
        batches = self._batches()
        started, first = time.monotonic(), self.step
        stopped = False
        with open(self.run / "log.jsonl", "a", encoding="utf-8") if self.board else nullcontext() as log:
            while self.step < s.steps and not stopped:
                loss, norm, stopped = self._train_step(batches, stop)
                record = {
                    "step": self.step,
                    "loss": loss,
                    "grad_norm": norm,
                    "skipped": self.skipped,
                    "steps_per_second": (self.step - first) / (time.monotonic() - started),
                }
                if self.accelerator.device.type == "cuda":
                    record["peak_gib"] = torch.cuda.max_memory_allocated(self.accelerator.device) / 2**30
                if self.board and log:
                    # JSON has no NaN: null stands for a step that was skipped.
                    log.write(json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n")
                    log.flush()
                    for name in ("loss", "grad_norm", "steps_per_second"):
                        self.board.add_scalar(f"train/{name}", record[name], self.step)
                on_step(record)
                if self._skipped_in_a_row >= MAX_SKIPPED:
                    raise EmtError(
                        f"the loss was not finite for {MAX_SKIPPED} steps in a row, the last was step {self.step}",
                        "Go on from a checkpoint before it with --resume and a lower --learning-rate, or train with "
                        "--precision fp32.",
                    )
                if stopped or self.step == s.steps or self.step % s.checkpoint_every == 0:
                    self.save_checkpoint()
                if s.sample_every and (self.step % s.sample_every == 0 or self.step == s.steps):
                    self._write_sheet()
        if self.step < s.steps:
            return False
        if self.board:
            self._write_result()
            self.board.close()
        self.accelerator.wait_for_everyone()
        return True

    def _train_step(self, batches: Iterator[list[Sample]], stop: Callable[[], bool]) -> tuple[float, float, bool]:
        """One step of the optimizer; its loss and gradient's norm, and whether a stop was requested in some process."""
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(self.settings.accumulate):
            samples = next(batches)
            for sample in samples:
                for path, problem in sample.problems.items():
                    if path not in self._bad:
                        self._bad.add(path)
                        self._say_here(f"{path}: skipped, {problem}")
            batch = self.prepare(samples, self.step, part)
            last = part == self.settings.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.loss):
                loss = self.loss(**batch) / self.settings.accumulate
                self.accelerator.backward(loss)
            total += loss.detach()
        self.step += 1
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRADIENT)
        # Processes see the same averaged gradients; the mean loss and requests to stop are reduced.
        reduced = self.accelerator.reduce(torch.stack([total, norm, total.new_tensor(float(stop()))]), "mean").tolist()
        if math.isfinite(reduced[0]) and math.isfinite(reduced[1]):
            self.optimizer.step()
            self.ema.step(self.trained.values())
            self._skipped_in_a_row = 0
        else:
            self.skipped += 1
            self._skipped_in_a_row += 1
        self.optimizer.zero_grad()
        return reduced[0], reduced[1], reduced[2] > 0

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _described(self) -> dict[str, Any]:
        """Everything that determines the losses of a run."""
        described: dict[str, Any] = {k: v for k, v in asdict(self.settings).items() if k not in _FREE}
        return described | {"processes": self.accelerator.num_processes, "pairs": self.dataset.fingerprint}

    def save_checkpoint(self) -> None:
        """Write RUN/checkpoints/step-N, whole or not at all, and remove those that are not kept.

        Raises:
            EmtError: If it cannot be written.
        """
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        folder = self.run / CHECKPOINTS / f"step-{self.step:08}"
        state: dict[str, Any] = {"step": self.step, "skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}
        state |= {"ema_step": self.ema.optimization_step, "settings": self._described()}
        try:
            remove_partials(folder.parent)  # of a run that was killed
            with new_folder(folder) as partial:
                save_file(self._weights(self.trained.values()), partial / "adapter.safetensors")
                save_file(self._weights(self.ema.shadow_params), partial / "ema.safetensors")
                torch.save(self.optimizer.state_dict(), partial / "optimizer.pt")
                write_text(partial / "state.json", json.dumps(state, indent=2) + "\n")
            for old in find_checkpoints(self.run)[: -self.settings.keep]:
                shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise EmtError(
                f"the checkpoint {folder} cannot be written: {error}",
                "Free some space and go on with: emt train … --resume latest",
            ) from error

    def _weights(self, values: Any) -> dict[str, Tensor]:
        state = {self._name(n): v.detach().cpu().contiguous() for n, v in zip(self.trained, values, strict=True)}
        bad = sum(not bool(tensor.isfinite().all()) for tensor in state.values())
        if bad:
            raise EmtError(
                f"{bad} of {len(state)} trained weights are not finite after step {self.step}: the training diverged",
                "Give a lower --learning-rate; --resume goes on from an earlier checkpoint.",
            )
        return state

    def _name(self, name: str) -> str:
        return published(type(self.pipe.unet).__name__, name)

    def _load(self, folder: Path) -> None:
        try:
            state = json.loads((folder / "state.json").read_bytes())
            weights = {kind: load_file(folder / f"{kind}.safetensors") for kind in ("adapter", "ema")}
            moments = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            self.step, self.skipped = state["step"], state["skipped"]
            self._skipped_in_a_row, self.ema.optimization_step = state["skipped_in_a_row"], state["ema_step"]
            before = dict(state["settings"])
            if not all(type(state[name]) is int for name in ("step", "skipped", "skipped_in_a_row", "ema_step")):
                raise TypeError("a count in its state.json is no whole number")
        except (*_DAMAGED, SafetensorError) as error:
            raise _unreadable(folder, error) from error
        shapes = {self._name(name): p.shape for name, p in self.trained.items()}
        for kind, targets in (("adapter", self.trained.values()), ("ema", self.ema.shadow_params)):
            check_keys(f"{kind} of {folder}", weights[kind], shapes)
            for name, target in zip(self.trained, targets):
                target.data.copy_(weights[kind][self._name(name)])
        try:
            # The learning rate is the command line's; the optimizer's state holds that of the earlier run.
            moments["param_groups"] = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(moments)
        except _DAMAGED as error:
            raise _unreadable(folder, error) from error
        if self.step > self.settings.steps:
            problem = f"{folder} is at step {self.step}, --steps is {self.settings.steps}"
            raise EmtError(problem, "Ask for more --steps.")
        for name, value in self._described().items():
            if before.get(name) != value:
                change = "the list of pairs has changed" if name == "pairs" else f"{name} was {before.get(name)}"
                self.say(f"resumed otherwise than before, {change}: the losses are not those of the run left alone")

    def _cut_log(self) -> None:
        """Take the steps that are going to be repeated out of RUN/log.jsonl."""
        if not self.accelerator.is_main_process:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        path = self.run / "log.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if _step_of(line) <= self.step))

    # --------------------------------------------------------------------------------------------------- the results

    def _write_sheet(self) -> None:
        """RUN/samples/step-N.png: of the first pairs the reference, the target and what the averaged weights make."""
        if self.board is None:
            return
        self.ema.store(self.trained.values())
        self.ema.copy_to(self.trained.values())
        try:
            with torch.no_grad(), self._autocast():
                made = [self._follow(sample) for sample in self.first]
            blocks = [(s.pair.caption, (s.reference, s.target, clip)) for s, clip in zip(self.first, made, strict=True)]
            sheet = contact_sheet(blocks, labels=("reference", "target", "result"))
            path = self.run / "samples" / f"step-{self.step:08}.png"
            path.parent.mkdir(exist_ok=True)
            sheet.save(path)
            self.board.add_image("samples", np.asarray(sheet), self.step, dataformats="HWC")
        except (EmtError, OSError) as error:
            self.say(f"no sample sheet at step {self.step}: {error}")
        finally:
            self.ema.restore(self.trained.values())

    def _follow(self, sample: Sample) -> np.ndarray:
        """A clip of the sample's caption that follows its reference."""
        return self.pipe.generate(sample.pair.caption, self.pipe.extract_motion(sample.reference))[0]

    def _write_result(self) -> None:
        """RUN/adapter.safetensors in published names, and RUN/model: the model with it, stored in its own type."""
        adapter = self._weights(self.ema.shadow_params)
        target = self.run / "adapter.safetensors"
        kind = type(self.pipe.unet).__name__
        metadata = None if kind == PUBLISHED else module_of(kind, "adapter_file").metadata(self.pipe.unet)
        try:
            remove_partials(self.run)  # of a run that was killed
            with partial_file(target) as partial:
                save_file(adapter, partial, metadata)
                apply_umask(partial)
                sync(partial)
                partial.replace(target)
            weights = sorted((self.model / "unet").glob("*.safetensors"))
            with safe_open(weights[0], "pt") as file:
                stored = file.get_slice(next(iter(file.keys()))).get_dtype()
            network = type(self.pipe.unet)
            unet = network.from_pretrained(self.model / "unet", dtype=_DTYPES.get(stored, torch.float32))
            with torch.no_grad():
                for name, parameter in unet.adapter_parameters():
                    parameter.copy_(adapter[self._name(name)])
            with new_folder(self.run / "model") as partial:
                shutil.copytree(self.model, partial, ignore=shutil.ignore_patterns(".*", "_*"), dirs_exist_ok=True)
                shutil.rmtree(partial / "unet")
                unet.save_pretrained(partial / "unet")
                listed = json.loads((partial / "model_index.json").read_bytes())
                if listed.pop("adapter", None) is not None:  # that of an import without one
                    write_text(partial / "model_index.json", json.dumps(listed, indent=2) + "\n")
                card = partial / "README.md"
                text = card.read_text(encoding="utf-8") if card.is_file() else "# Motion transfer model\n"
                write_text(card, f"{text.rstrip()}\n\n{self._account()}")
        except (OSError, SafetensorError) as error:
            raise EmtError(
                f"the result cannot be written to {self.run}: {error}",
                "Free some space and go on with: emt train … --resume latest",
            ) from error

    def _account(self) -> str:
        s = self.settings
        batch = s.batch_size * s.accumulate * self.accelerator.num_processes
        own = len(getattr(self.pipe.unet.config, "denoising_layers", None) or ())
        kept = f" {own} more layers denoise here, as before; adapter.safetensors is without them." if own else ""
        return (
            "## Training of the adapter\n\n"
            f"By `emt train`: {self.step} steps of {batch} of {len(self.dataset.pairs)} pairs, AdamW at "
            f"{s.learning_rate:g}, {s.drop_text:.0%} of the captions dropped, {s.precision}, weights averaged "
            f"(decay {s.ema_decay:g}), seed {s.seed}; {self.skipped} steps skipped because their loss was not finite."
            f"{kept}\n"
        )


def _unreadable(folder: Path, error: Exception) -> EmtError:
    return EmtError(
        f"{folder} is not a checkpoint that can be read: {first_line(error)}",
        f"Checkpoints are RUN/{CHECKPOINTS}/step-…; --resume latest takes the latest one.",
    )


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.inf  # torn by a crash


def _start_worker(worker: int) -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM reach these too; they end when the run has no more need of them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
