"""First calls of a model's networks, made while the weights are still on their way to the GPU.

The first calls of a shape take seconds in which the GPU computes almost nothing: cuDNN builds plans, a thread its own,
libraries load their kernels, and Triton's are loaded or compiled. None of that depends on the numbers. So it is done
by copies of the networks that have no weights of their own (`stand_in`), on the thread that computes afterwards, while
other threads read the weights.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emt.backends.base import Networks
from emt.backends.torch import TorchBackend


@dataclass(eq=False)
class StandIn:
    """Networks of a pipeline with zeros for weights."""

    unet: Any
    vae: Any
    tokenizer: Any
    vae_scale_factor: int
    device: torch.device


def stand_in(pipe: Networks, device: torch.device | str) -> StandIn:
    """Copies of a pipeline's network and VAE on a device, whose weights are parts of one tensor of zeros a dtype.

    They take the memory of the largest weight, and have the layouts that weights have on a GPU: convolutions are
    channels-last.
    """
    device, networks = torch.device(device), (pipe.unet, pipe.vae)
    weights = {id(p): p for network in networks for p in network.parameters()}
    largest: dict[torch.dtype, int] = {}
    for p in weights.values():
        largest[p.dtype] = max(largest.get(p.dtype, 0), p.numel())
    zeros = {dtype: torch.zeros(count, dtype=dtype, device=device) for dtype, count in largest.items()}
    parts = {key: nn.Parameter(_shaped(zeros[p.dtype], p), requires_grad=False) for key, p in weights.items()}
    unet, vae = (copy.deepcopy(network, dict(parts)).to(device) for network in networks)
    return StandIn(unet, vae, pipe.tokenizer, pipe.vae_scale_factor, device)


def _shaped(zeros: Tensor, like: Tensor) -> Tensor:
    """The first of `zeros` in the shape of a weight, channels-last if it is a convolution's."""
    flat = zeros[: like.numel()]
    plain = flat.view(like.shape)
    if like.ndim != 4 or plain.is_contiguous(memory_format=torch.channels_last):  # whose strides stay as they are, too
        return plain
    out, channels, height, width = like.shape
    return flat.view(out, height, width, channels).permute(0, 3, 1, 2)


def move_and_rehearse(pipe: Any, device: torch.device | str, shape: tuple[int, int, int]) -> None:
    """Move a pipeline's parts to a GPU in another thread, and make the first calls of a shape in this one meanwhile.

    Args:
        pipe: a `MotionTransfer` whose backend is `TorchBackend`; the backend is prepared for the shape afterwards.
        device: where to.
        shape: frames, height and width of clips.

    Raises:
        torch.OutOfMemoryError: there is no room for the parts.
    """
    there: StandIn | None = None
    with suppress(
        Exception
    ):  # here and below: a rehearsal only saves time, and the calls themselves raise what is wrong
        there = stand_in(pipe, device)
    with ThreadPoolExecutor(1) as pool:
        moved = pool.submit(pipe.to, device)
        with suppress(Exception):
            if there:
                _rehearse(pipe.backend, there, shape)
    del there
    if isinstance(moved.exception(), torch.OutOfMemoryError):  # beside the rehearsal; `upload` has changed nothing
        torch.cuda.empty_cache()
        pipe.to(device)
    else:
        moved.result()


def _rehearse(backend: TorchBackend, there: StandIn, shape: tuple[int, int, int]) -> None:
    rehearsal = TorchBackend(there)
    rehearsal.phase = backend.phase
    rehearsal.prepare_shape(*shape)
    backend.adopt(rehearsal)
