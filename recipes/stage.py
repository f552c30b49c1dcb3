"""What the stages share: sizes of the small model, rendered latents, a trainer that replays CUDA graphs, logs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from emt.backbones.sd15.unet import MotionTransferUNet
from emt.synthetic.motions import Motions, discs
from emt.synthetic.renderer import World
from emt.train.objective import Objective
from emt_kernels import selection
from recipes.text import make_text_encoder, make_tokenizer

# ------------------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks and of the rendered clips."""

    side: int = 128
    frames: int = 16
    variants: int = 1  # paintings of each scene of the world
    textures: int = 48  # that its footage draws from
    latents: int = 8  # channels; with 4, a subject of 40 pixels came back as a blot
    vae: tuple[int, ...] = (32, 64, 96, 96)
    unet: tuple[int, ...] = (96, 128)
    groups: int = 16
    heads: int = 4
    text_width: int = 128
    text_layers: int = 3


MINUTES = {"vae": 2.7, "latents": 3.7, "frames": 4.0, "motion": 3.0, "video": 15.0, "adapter": 4.0}
"""Time of each stage."""

REFERENCE_TIMESTEP = 20
"""Noise level at which the small model reads references.

The published 400 is meant for latents of 64×64. Of 16×16, with a sixteenth of the values to average over, it leaves
less than is needed: what a backbone itself sees at 400 tells paths (correlation 0.999 with the truth), but not how
subjects turn (0.1; 0.97 at 50), and the camera's way only in part (0.77).
"""

SMALL = Sizes()
"""The small model."""
TINY = Sizes(
    side=32,
    frames=4,
    textures=4,
    latents=4,
    vae=(16, 16, 16, 16),
    unet=(16, 32),
    groups=8,
    text_width=32,
    text_layers=1,
)
"""A toy with the same parts, to try the recipes on a CPU."""


def make_vae(sizes: Sizes) -> AutoencoderKL:
    """A KL autoencoder, 8 pixels a latent, without attention."""
    levels = len(sizes.vae)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae,
        layers_per_block=1,
        latent_channels=sizes.latents,
        norm_num_groups=min(sizes.groups, 16),
        sample_size=sizes.side,
        scaling_factor=1.0,  # not known before there are latents
        mid_block_add_attention=False,
    )


def make_unet(sizes: Sizes, fusion_blocks: Sequence[int] | None) -> MotionTransferUNet:
    """The network; `fusion_blocks` () for the backbone alone, None for the adapter in all up blocks."""
    unet = MotionTransferUNet(
        in_channels=sizes.latents,
        out_channels=sizes.latents,
        block_out_channels=sizes.unet,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_heads=sizes.heads,
        motion_attention_heads=sizes.heads,
        norm_num_groups=sizes.groups,
        motion_mid_block=True,
        motion_max_frames=sizes.frames,
        attention_levels=list(range(len(sizes.unet))),
        fusion_blocks=fusion_blocks if fusion_blocks is None else list(fusion_blocks),
    )
    with torch.no_grad():
        # A motion module whose output is zero is no module: video training starts from the frames that were learnt.
        for name, parameter in unet.named_parameters():
            if "temporal_transformer.proj_out" in name or name.startswith("conv_out"):
                parameter.zero_()
    return unet


def make_scheduler() -> DDIMScheduler:
    """Scaled-linear betas with zero terminal signal (Lin et al. 2024), v-prediction, trailing timesteps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


@functools.lru_cache(maxsize=1)
def make_world(device: torch.device, sizes: Sizes) -> World:
    """The rendered world; painting its scenes takes a while, so that the stages of one process share it."""
    return World(
        device,
        size=sizes.side,
        frames=sizes.frames,
        variants=sizes.variants,
        textures=sizes.textures,
        free_views=False,
    )


# -------------------------------------------------------------------------------------------------------- processes


def join(device: str) -> torch.device:
    """Join the processes that torchrun started on this host, if it did; returns the device of this one.

    Numbers travel between CPUs (gloo), so that they never wait for a GPU; what is on GPUs goes through NCCL.
    """
    # Taken out of the environment: what is started from here (compilers, the judge) is none of these processes.
    count = int(os.environ.pop("WORLD_SIZE", 1))
    own, local = (int(os.environ.pop(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    on_gpu = torch.device(device).type == "cuda"
    if count > 1:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=own, world_size=count)
        if on_gpu:
            torch.cuda.set_device(local)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu and ranks() > 1 else torch.device(device)


def leave() -> None:
    """Go on alone; all processes leave at the same point."""
    if ranks() > 1:
        distributed.destroy_process_group()


def rank() -> int:
    """Number of this process among those that train together, 0 if it is alone."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def ranks() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def average_over_ranks(tensor: Tensor) -> Tensor:
    """Replace a tensor by its mean over all processes; returns it. All end with the same bits."""
    if ranks() > 1:
        distributed.all_reduce(tensor)
        tensor.div_(ranks())
    return tensor


def from_rank_0(number: float) -> float:
    """The number that the first process has."""
    if ranks() == 1:
        return number
    shared = torch.tensor(number, dtype=torch.float64)
    distributed.broadcast(shared, 0)
    return shared.item()


def all_agree(flag: bool) -> bool:
    """Whether it is true in all processes."""
    return average_over_ranks(torch.tensor(float(flag))).item() == 1


def wait_for_ranks() -> None:
    """Go on once all processes have come here, with what each has written."""
    all_agree(True)


def say(text: str) -> None:
    """Print a line, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


# ----------------------------------------------------------------------------------------------------- command line


def stage_parser(description: str | None, minutes: float, batch: int) -> argparse.ArgumentParser:
    """The options that every stage has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages' results")
    parser.add_argument("--minutes", type=float, default=minutes, help="time for this stage")
    parser.add_argument("--steps", type=int, help="stop after so many steps instead")
    parser.add_argument("--batch", type=int, default=batch, help="of each process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--compile", action="store_true", help="fuse the network's kernels with torch.compile")
    parser.add_argument("--compile-only", action="store_true", help="fill torch.compile's cache for this stage and end")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the recipe on a CPU")
    return parser


@dataclass
class Stage:
    """One run of a stage: where and how it computes, its log, and whether it was told to stop."""

    name: str
    options: argparse.Namespace

    def __post_init__(self) -> None:
        o = self.options
        self.out: Path = o.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = join(o.device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.sizes = TINY if o.tiny else SMALL
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.graph = self.device.type == "cuda" and not o.eager
        # The compiler fuses norms with what stands around them, in both directions; a kernel would be a wall to it.
        selection.select("reference")
        # Networks start alike in all processes, what they are shown differs.
        torch.manual_seed(o.seed)
        self.generator = torch.Generator(self.device).manual_seed(o.seed + 1_000_003 * rank())
        self.started = time.monotonic()
        self._printed = 0.0
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    @functools.cached_property
    def world(self) -> World:
        """The rendered world on this stage's device."""
        return make_world(self.device, self.sizes)

    def share(self, step: int) -> float:
        """How much of the stage is done, by steps if they are given and by the clock otherwise; 1 once told to stop."""
        if stop_requested():
            return 1.0
        if self.options.steps is not None:
            return step / self.options.steps
        return (time.monotonic() - self.started) / (60 * self.options.minutes)

    def elapsed(self) -> float:
        """Seconds since the start, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - self.started

    def log(self, step: int, force: bool = False, **numbers: float) -> None:
        """Append a line of JSON to OUT/log.jsonl, and print one every 15 seconds, in the first process."""
        if rank():
            return
        seconds = time.monotonic() - self.started
        done = min(max(self.share(step), 1e-6), 1.0)
        record = {"stage": self.name, "step": step, "time": seconds, "left": seconds * (1 / done - 1), **numbers}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}) + "\n")
        if force or time.monotonic() - self._printed > 15:
            self._printed = time.monotonic()
            shown = " ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            print(f"[{self.name}] step {step}, {seconds:.0f} s, {record['left']:.0f} s left: {shown}", flush=True)


_stop = False


def stop_requested() -> bool:
    """Whether SIGTERM or Ctrl-C came: stages then end as if their time was over, and save."""
    return _stop


def save_on_signals() -> None:
    """Make SIGTERM and Ctrl-C end the running stage in order; a second one ends at once."""

    def handle(number: int, _: Any) -> None:
        global _stop
        _stop = True
        signal.signal(number, signal.SIG_DFL)
        print("stopping: the running stage saves what it has", flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


# ---------------------------------------------------------------------------------------------------------- weights


def save_weights(path: Path, metadata: dict[str, str] | None = None, **modules: dict[str, Tensor]) -> None:
    """Write state dicts under their prefixes into one safetensors file, atomically."""
    state = {
        f"{prefix}.{k}": v.detach().cpu().contiguous() for prefix, part in modules.items() for k, v in part.items()
    }
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata)
    os.replace(partial, path)


def load_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """The state dict that `save_weights` wrote under `prefix`."""
    return {k[len(prefix) + 1 :]: v for k, v in load_file(path).items() if k.startswith(prefix + ".")}


def load_vae(out: Path) -> AutoencoderKL:
    """The autoencoder that `train_vae` wrote."""
    return AutoencoderKL.from_pretrained(out / "vae", low_cpu_mem_usage=False).requires_grad_(False).eval()


def make_base(sizes: Sizes, start: Path | None = None) -> tuple[MotionTransferUNet, CLIPTextModel]:
    """Backbone and text encoder: new, from the result of a stage, or from a model folder."""
    unet, text = make_unet(sizes, ()), make_text_encoder(sizes.text_width, sizes.text_layers)
    if start is not None and start.is_dir():
        text.load_state_dict(CLIPTextModel.from_pretrained(start / "text_encoder").float().state_dict())
        unet.load_state_dict({k: v for k, v in network_weights(start).items() if k in unet.state_dict()})
    elif start is not None:
        unet.load_state_dict(load_weights(start, "unet"))
        text.load_state_dict(load_weights(start, "text"))
    return unet, text


def add_adapter(
    base: MotionTransferUNet, sizes: Sizes, fusion_blocks: Sequence[int] | None = None
) -> MotionTransferUNet:
    """A network with the weights of a backbone, and an adapter that is new in some up blocks, or all.

    The adapter's projections are the backbone's, and its scalers half open.
    """
    unet = make_unet(sizes, fusion_blocks)
    unet.load_state_dict(unet.state_dict() | base.state_dict())
    unet.initialize_adapter()
    set_scalers(unet, open_always=False)
    return unet


@torch.no_grad()
def set_scalers(unet: MotionTransferUNet, *, open_always: bool) -> None:
    """Start the scalers half open, or take them out: open for ever.

    The network subtracts 5 before the sigmoid, so that a scaler starts closed and passes a hundredth of the gradient;
    a bias of 5 on its last convolution takes that back.
    """
    for module in unet.fusion_modules().values():
        last = module.temporal_transformer.transformer_blocks[0].scaler.spatial_convs[2]
        last.bias.fill_(20.0 if open_always else 5.0)
        if open_always:
            last.weight.zero_()


def network_weights(start: Path) -> dict[str, Tensor]:
    """The network's state dict, its adapter if there is one, in a model folder or a stage's result, in float32."""
    if start.is_dir():
        return MotionTransferUNet.from_pretrained(start / "unet", low_cpu_mem_usage=False).float().state_dict()
    return load_weights(start, "unet") | load_weights(start, "adapter")


# ---------------------------------------------------------------------------------------------------------- latents


def cover(motions: Motions, side: int) -> Tensor:
    """Where subjects are: (n, frames, side, side) uint8, a disc around each as wide as its sprite."""
    return discs(motions.position, 0.5 * motions.scale, side).any(2).to(torch.uint8)


def latents_path(out: Path, rank: int) -> Path:
    """The latents that a process rendered."""
    return out / (f"latents-{rank}.safetensors" if rank else "latents.safetensors")


SUBJECT_WEIGHT = 3.0
"""Extra weight of the loss where a subject is: subjects are a tenth of the picture and most of what prompts ask for."""


@dataclass
class Clips:
    """Latents of rendered clips on the device: the same motions in several appearances.

    Any two appearances of a motion are an exact pair. The last one is realistic: it has no caption.
    """

    latents: Tensor  # (motions, appearances, channels, frames, height, width) float16, scaled
    tokens: Tensor  # (motions, appearances, tokens) int32
    subjects: Tensor  # (motions, frames, height, width) uint8, 1 where a subject is
    displacements: Tensor  # (motions, frames, 2, height, width) float16, `Motions.displacements`
    poses: Tensor  # (motions, frames, 4, height, width) float16, `Motions.poses`

    @classmethod
    def load(cls, out: Path, device: torch.device) -> Clips:
        """What `render_latents` wrote in this process, or in the first one if there were fewer."""
        path = latents_path(out, rank())
        if not path.exists():
            path = latents_path(out, 0)
        with safe_open(str(path), "pt", device=str(device)) as file:
            return cls(**{field.name: file.get_tensor(f"clips.{field.name}") for field in fields(cls)})

    @classmethod
    def random(cls, stage: Stage) -> Clips:
        """Noise of the right shape, enough to compile a stage with."""
        sizes, side = stage.sizes, stage.sizes.side // 8
        latents = torch.randn(4, 4, sizes.latents, sizes.frames, side, side, device=stage.device).half()
        tokens = tokenize(make_tokenizer(), [""]).to(stage.device)
        subjects = torch.zeros(4, sizes.frames, side, side, dtype=torch.uint8, device=stage.device)
        displacements, poses = (
            torch.zeros(4, sizes.frames, numbers, side, side, dtype=torch.float16, device=stage.device)
            for numbers in (2, 4)
        )
        return cls(latents, tokens.expand(4, 4, -1), subjects, displacements, poses)

    def draw(
        self, n: int, generator: torch.Generator, *, drop: float, realistic: float, frames: int | None = None
    ) -> dict[str, Tensor]:
        """A batch of clips with tokens, the caption dropped with probability `drop` and where there is none.

        Whole clips come with their truth: `truth`.

        Args:
            n: clips.
            generator: on the device.
            drop: probability of the empty caption.
            realistic: probability of a realistic clip.
            frames: so many frames of each clip, any of them; None for all in order.
        """
        motion = self._index(len(self.latents), n, generator)
        rendered = self.latents.shape[1] - 1
        chance = torch.rand(n, generator=generator, device=generator.device)
        view = torch.where(chance < realistic, rendered, self._index(rendered, n, generator))
        if frames is None:
            latents, subjects = self.latents[motion, view], self.subjects[motion]
        else:
            which = self._index(self.latents.shape[3], n * frames, generator).view(n, frames)
            latents = self.latents[motion[:, None], view[:, None], :, which].transpose(1, 2)
            subjects = self.subjects[motion[:, None], which]
        batch = {
            "latents": latents,
            "tokens": self._captions(motion, view, generator, drop),
            "subject": SUBJECT_WEIGHT * subjects[:, None].float(),
        }
        return batch if frames else batch | self.truth(motion, view)

    def draw_pairs(
        self,
        n: int,
        generator: torch.Generator,
        *,
        drop: float,
        realistic: float,
        targets: int = 1,
        mismatched: float = 0.0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """References, and targets that play the same motions in other appearances.

        Args:
            n: references.
            generator: on the device.
            drop: probability of the empty caption.
            realistic: probability that the reference is the realistic clip of the motion.
            targets: of each reference; target i follows reference i mod n.
            mismatched: share of references that move otherwise, as among pairs that nothing has filtered.

        Returns:
            The n references with their truth, and the n · targets targets with their tokens, as from `draw`.
        """
        rendered = self.latents.shape[1] - 1
        motion = self._index(len(self.latents), n, generator)
        # No two clips of a motion are the same appearance.
        looks = torch.rand(n, rendered, generator=generator, device=generator.device).argsort(1)
        chance = torch.rand(2, n, generator=generator, device=generator.device)
        worn = torch.where(chance[0] < realistic, rendered, looks[:, -1])
        source = torch.where(chance[1] < mismatched, self._index(len(self.latents), n, generator), motion)
        references = {"latents": self.latents[source, worn], **self.truth(source, worn)}
        motion, asked = motion.repeat(targets), looks[:, :targets].T.flatten()
        return references, {
            "latents": self.latents[motion, asked],
            "tokens": self._captions(motion, asked, generator, drop),
            "subject": SUBJECT_WEIGHT * self.subjects[motion][:, None].float(),
            **self.truth(motion, asked),
        }

    def truth(self, motion: Tensor, view: Tensor) -> dict[str, Tensor]:
        """How clips move, for `MotionReader`: displacement, pose, and whether their subjects have an upright."""
        upright = (view < self.latents.shape[1] - 1).float()
        return {
            "displacement": self.displacements[motion].float(),
            "pose": self.poses[motion].float(),
            "upright": upright,
        }

    def _index(self, below: int, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(below, (n,), generator=generator, device=generator.device)

    def _captions(self, motion: Tensor, view: Tensor, generator: torch.Generator, drop: float) -> Tensor:
        dropped = torch.rand(len(motion), generator=generator, device=generator.device) < drop
        # The realistic clips' tokens are those of the empty prompt.
        empty = self.tokens[:1, -1]
        return torch.where(dropped[:, None], empty, self.tokens[motion, view]).long()


def with_noise(
    batch: dict[str, Tensor], objective: Objective, generator: torch.Generator, dtype: torch.dtype, shift: float
) -> dict[str, Tensor]:
    """Add timesteps and noise to a batch, latents in the type of the network."""
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    latents = batch["latents"]
    for name in ("noise", "reference_noise") if "reference" in batch else ("noise",):
        batch[name] = torch.randn(latents.shape, generator=generator, device=latents.device)
    return batch | {"timestep": objective.sample_timesteps(len(latents), generator, shift)}


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Tensor:
    """(prompts, tokens) int32, padded to the tokenizer's length."""
    length = tokenizer.model_max_length
    found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.input_ids.int()


# ---------------------------------------------------------------------------------------------------------- trainer


class NonFiniteLoss(RuntimeError):
    """Training has diverged."""


class Trainer:
    """AdamW with float32 masters and an average of the weights, one step of which is one CUDA graph.

    The trained parameters become views of one flat buffer in the type of the network, gradients are gathered into
    one flat float32 buffer: clipping, the optimizer, the average and the cast back are a dozen kernels in all.
    Everything random is drawn outside and copied into the graph's inputs.

    Several processes take the same step, that of all their batches together: between the backward pass and the rest,
    each a graph of its own then, their gradients are averaged.

    Args:
        loss: takes a batch's tensors by name, returns a scalar, a mean over the batch. It may not wait for the device.
        groups: lists of parameters, each with its learning rate.
        average: decay of the average of the weights, lower at the beginning.
        graph: capture a CUDA graph after checking that it repeats two eager steps.
        betas: of AdamW.
        clip: largest norm of the gradient.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        groups: Sequence[tuple[Sequence[nn.Parameter], float]],
        *,
        average: float = 0.999,
        graph: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        clip: float = 1.0,
    ) -> None:
        self.loss, self.average, self.clip, self.use_graph = loss, average, clip, graph
        self.parameters = [p for parameters, _ in groups for p in parameters]
        device = self.parameters[0].device
        # Every parameter starts at 128 bytes or more, which the fast kernels for matrices want.
        offsets, sizes, total = [], [], 0
        for parameters, _ in groups:
            first = total
            for p in parameters:
                offsets.append(total)
                total += math.ceil(p.numel() / 128) * 128
            sizes.append(slice(first, total))
        self.flat = torch.zeros(total, device=device, dtype=self.parameters[0].dtype)
        self.master = torch.zeros(total, device=device)
        self.gradient = torch.zeros(total, device=device)
        self.averaged = torch.zeros(total, device=device)
        places = list(zip(self.parameters, offsets, strict=True))
        self._master_views, self._gradient_views, self._averaged_views, self._flat_views = (
            [flat.as_strided(p.shape, p.stride(), at) for p, at in places]
            for flat in (self.master, self.gradient, self.averaged, self.flat)
        )
        for p, master, flat in zip(self.parameters, self._master_views, self._flat_views, strict=True):
            master.copy_(p.detach())
            flat.copy_(p.detach())
            p.data = flat
        if ranks() > 1:
            distributed.broadcast(self.master, 0)
            self.flat.copy_(self.master)
        self.averaged.copy_(self.master)

        masters = [self.master[part] for part in sizes]
        for master, part in zip(masters, sizes, strict=True):
            master.grad = self.gradient[part]
        self.base_rates = [rate for _, rate in groups]
        self.rates = [torch.zeros((), device=device) for _ in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": [m], "lr": rate} for m, rate in zip(masters, self.rates, strict=True)],
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.step_count = 0
        self._blend = torch.zeros((), device=device)
        self._sums = torch.zeros(3, device=device)  # loss, norm of the gradient, steps that were not finite
        self._steps_summed = 0
        self._inputs: dict[str, Tensor] = {}
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def step(self, batch: dict[str, Tensor], rate: float) -> None:
        """Train on a batch, at `rate` times the learning rates."""
        for tensor, base in zip(self.rates, self.base_rates, strict=True):
            tensor.fill_(base * rate)
        self._blend.fill_(1 - min(self.average, (1 + self.step_count) / (10 + self.step_count)))
        if not self._inputs:
            self._inputs = {name: value.clone() for name, value in batch.items()}
            if self.use_graph:
                self._capture()
        for name, value in self._inputs.items():
            value.copy_(batch[name])
        if self._graphs:
            self._replay(self._graphs)
        else:
            self._update()
        self.step_count += 1
        self._steps_summed += 1

    def try_once(self, batch: dict[str, Tensor]) -> None:
        """Take one eager step, which compiles whatever is to be compiled.

        Raises:
            NonFiniteLoss: if it was not finite.
        """
        self._inputs = {name: value.clone() for name, value in batch.items()}
        self._update()
        self._steps_summed = 1
        self.read()

    def read(self) -> dict[str, float]:
        """Mean loss, over all processes, and gradient norm since the last call. Waits for the device.

        Raises:
            NonFiniteLoss: if most of those steps were not finite; single ones are skipped.
        """
        loss, norm, bad = average_over_ranks(self._sums).tolist()
        steps = max(self._steps_summed, 1)
        self._sums.zero_()
        self._steps_summed = 0
        if bad > steps / 2 or not math.isfinite(loss):
            raise NonFiniteLoss(f"{bad:.0f} of {steps} steps were not finite at step {self.step_count}")
        return {"loss": loss / steps, "norm": norm / steps, "skipped": bad}

    def apart(self) -> float:
        """Largest difference of a weight between processes: 0, since all take the same steps."""
        highest, lowest = self.master.clone(), self.master.clone()
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
        return (highest - lowest).max().item()

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the parameters, in float32."""
        for p, view in zip(self.parameters, self._averaged_views, strict=True):
            p.data = view.clone()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the parameters hold the averaged weights, in float32; training goes on from its own after that."""
        self.use_average()
        yield
        for p, flat in zip(self.parameters, self._flat_views, strict=True):
            p.data = flat

    def close(self) -> None:
        """Give back the graphs' memory."""
        self._graphs = []
        gc.collect()
        if self.master.is_cuda:
            torch.cuda.empty_cache()

    def _update(self) -> None:
        loss = self._backward()
        average_over_ranks(self.gradient)
        self._descend(loss)

    def _backward(self) -> Tensor:
        """Gather this process's gradient; returns its loss."""
        loss = self.loss(**self._inputs)
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            torch._foreach_copy_(self._gradient_views, gradients)
        return loss.detach()

    @torch.no_grad()
    def _descend(self, loss: Tensor) -> None:
        """Take the step that the gradient asks for."""
        norm = torch.linalg.vector_norm(self.gradient)
        finite = norm.isfinite()
        self.gradient.mul_((self.clip / (norm + 1e-6)).clamp(max=1.0))
        self.gradient.masked_fill_(~finite, 0.0)
        self.optimizer.step()
        self.flat.copy_(self.master)
        self.averaged.lerp_(self.master, self._blend)
        zero = torch.zeros_like(norm)
        self._sums += torch.stack(
            [torch.where(finite, loss.float(), zero), torch.where(finite, norm, zero), (~finite).float()]
        )

    def _state(self) -> list[Tensor]:
        moments = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return [self.master, self.flat, self.averaged, self._sums, *moments]

    @torch.no_grad()
    def _restore(self, saved: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._state(), saved, strict=True):
            tensor.copy_(value)

    def _two_losses(self, update: Callable[[], None]) -> list[float]:
        losses = []
        for _ in range(2):
            self._sums.zero_()
            update()
            losses.append(self._sums[0].item())
        self._sums.zero_()
        return losses

    def _capture(self) -> None:
        """Capture a step, check it against two eager ones, and leave the weights as they were.

        Processes use their graphs if all of them can: one that went on without would still have to meet the others.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # The first step makes the optimizer's state and lets the libraries choose and allocate.
            before = [self.master.clone(), self.flat.clone(), self.averaged.clone()]
            self._update()
            for tensor, value in zip((self.master, self.flat, self.averaged), before, strict=True):
                tensor.copy_(value)
            for tensor in self._state()[3:]:
                tensor.zero_()
            saved = [t.clone() for t in self._state()]
            eager = self._two_losses(self._update)
            self._restore(saved)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graphs: list[torch.cuda.CUDAGraph] = []
        try:
            graphs = self._record(side)
        except RuntimeError as error:
            print(f"no CUDA graph, training goes on without: {error}", flush=True)
        if not all_agree(bool(graphs)):
            torch.cuda.synchronize()
            self._restore(saved)
            return
        captured = self._two_losses(lambda: self._replay(graphs))
        self._restore(saved)
        close = all(abs(a - b) <= 0.02 * abs(a) + 1e-4 for a, b in zip(eager, captured, strict=True))
        if rank() == 0 or not close:
            print(f"eager losses {eager}, graph losses {captured}: {'the same' if close else 'NO GRAPH'}", flush=True)
        if all_agree(close):
            self._graphs = graphs

    def _record(self, stream: torch.cuda.Stream) -> list[torch.cuda.CUDAGraph]:
        """A step as one graph, or as its two halves if gradients are averaged between them."""
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        if ranks() == 1:
            with torch.cuda.graph(first, stream=stream):
                self._update()
            return [first]
        # Thread-local: NCCL's watchdog, a thread of its own, may ask for events meanwhile.
        with torch.cuda.graph(first, stream=stream, capture_error_mode="thread_local"):
            loss = self._backward()
        with torch.cuda.graph(second, pool=first.pool(), stream=stream, capture_error_mode="thread_local"):
            self._descend(loss)
        return [first, second]

    def _replay(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        first, *rest = graphs
        first.replay()
        for graph in rest:
            average_over_ranks(self.gradient)
            graph.replay()


def schedule(step: int, share: float, warmup: int, hold: float = 0.4) -> float:
    """Factor of the learning rate: up over `warmup` steps, constant up to `hold` of the stage, then a cosine to 0."""
    falling = max(share - hold, 0.0) / (1 - hold)
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * min(falling, 1.0)))


def train(
    stage: Stage,
    trainer: Trainer,
    batches: Callable[[], dict[str, Tensor]],
    *,
    warmup: int = 100,
    hold: float = 0.4,
    measure: Callable[[], dict[str, float]] | None = None,
    save: Callable[[], None] | None = None,
) -> None:
    """Run a stage's steps until its time is over or it is told to stop; the averaged weights are then in place.

    What `measure` finds since its last call goes into the log with the losses. `save` is called every
    `save_minutes`, an option of the stage, with the averaged weights in place.

    Of several processes the first has the clock, and hears of a stop: the others are told every 20 steps, since each
    time they wait for each other, and all keep to what was told last.
    """
    if stage.options.compile_only:
        trainer.try_once(batches())
        stage.log(1, force=True, seconds=stage.elapsed())
        return
    step, every = 0, 20 if stage.options.steps is None else 1
    stage.started = time.monotonic()
    share = from_rank_0(stage.share(step))
    since, counted, saved = time.monotonic(), 0, time.monotonic()
    while share < 1:
        trainer.step(batches(), schedule(step, share, warmup, hold))
        step += 1
        if step % every == 0:
            numbers = trainer.read() | (measure() if measure is not None else {})
            now = time.monotonic()
            rate = (step - counted) / (now - since)
            since, counted = now, step
            memory = torch.cuda.max_memory_reserved() / 2**30 if stage.device.type == "cuda" else 0.0
            clips = rate * stage.options.batch * ranks()
            stage.log(step, steps_per_second=rate, clips_per_second=clips, gib=memory, **numbers)
            if save is not None and rank() == 0 and now - saved > 60 * stage.options.save_minutes:
                with trainer.averaged_weights():
                    save()
                saved = time.monotonic()
        if ranks() == 1 or step % every == 0:
            share = from_rank_0(stage.share(step))
    apart = {"apart": trainer.apart()} if ranks() > 1 else {}
    trainer.use_average()
    trainer.close()
    stage.log(step, force=True, seconds=stage.elapsed(), **apart)


# ------------------------------------------------------------------------------------------------ how networks run


@contextlib.contextmanager
def kernel_attention(stage: Stage) -> Iterator[None]:
    """Within, temporal attention trains through its kernel, where that runs.

    PyTorch's fused attention is made for long sequences and spends most of a tile on nothing at 16 frames: forward and
    backward, a layer of 48 or 64 clips takes 1.5 to 1.8 ms on an H100 through the kernel (4.4 once, beside compilers),
    3.1 to 5.3 without.
    """
    if stage.device.type != "cuda" or selection.unavailable():
        yield
        return
    with selection.substitutes(temporal_attention=torch.ops.emt.temporal_attention):
        yield


@contextlib.contextmanager
def compiled(stage: Stage, unet: MotionTransferUNet, *passes: str) -> Iterator[None]:
    """Within, these passes of the network are compiled: fused, a training step takes 0.6 of the time (109 for 179 ms).

    Compiling takes one and a half to four minutes; `--compile-only`, in a process of its own, does it ahead of time.
    """
    if not (stage.options.compile or stage.options.compile_only):
        yield
        return
    for name in passes:
        setattr(unet, name, torch.compile(getattr(unet, name)))
    try:
        yield
    finally:
        for name in passes:
            delattr(unet, name)
