"""Processes that train together: joining, averaging, agreeing."""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed


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
    """Number of processes that train together."""
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
    """Return whether it is true in all processes."""
    return average_over_ranks(torch.tensor(float(flag))).item() == 1


def wait_for_ranks() -> None:
    """Go on once all processes have come here, with what each has written."""
    all_agree(True)


def say(text: str) -> None:
    """Print a line, in the first process only."""
    if rank() == 0:
        print(text, flush=True)
