"""Weights on their way from mapped files to a GPU, by several threads at once.

A copy of pageable memory to a GPU is made by one thread of the driver, which also waits for the pages of the file. Here
threads read pages into pinned memory of their own, from which the GPU fetches them while the next ones are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor, nn

_THREADS = 4
_BUFFERS = 2  # of a thread
_BUFFER_BYTES = 16 << 20


def upload(networks: Iterable[nn.Module], device: torch.device | str) -> None:
    """Bring the weights of networks that are in the computer's memory to a device; buffers stay where they are.

    Args:
        networks: whose parameters are replaced in place; one that is shared is copied once.
        device: the GPU. Any other device is served as well, for the sake of tests.

    Raises:
        torch.OutOfMemoryError: there is no room on it.
    """
    device = torch.device(device)
    found = {id(p): p for network in networks for p in network.parameters() if p.device.type == "cpu"}
    weights = sorted(found.values(), key=lambda p: -p.numel())  # threads that share the work end at the same time
    places = [torch.empty_like(p, device=device) for p in weights]
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # what used these addresses before
    pairs = [(p.data, place) for p, place in zip(weights, places, strict=True)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for copied in [pool.submit(_copy, pairs[i::_THREADS], device) for i in range(_THREADS)]:
            copied.result()
    for p, place in zip(weights, places, strict=True):
        p.data = place


def _copy(pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Copy tensors to others on a device, through pinned memory."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _copy_here(pairs, device)


def _copy_here(pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    # Streams of this priority are others than those that graphs are captured on.
    stream = torch.cuda.Stream(device, priority=-1) if on_gpu else None
    pinned = [torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(_BUFFERS)]
    fetched: list[torch.cuda.Event | None] = [None] * _BUFFERS
    turn = 0
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        for source, place in pairs:
            if not (source.is_contiguous() and place.is_contiguous()):
                place.copy_(source)
                continue
            here, there = source.view(-1).view(torch.uint8), place.view(-1).view(torch.uint8)
            for part, target in zip(here.split(_BUFFER_BYTES), there.split(_BUFFER_BYTES), strict=True):
                if event := fetched[turn]:
                    event.synchronize()
                staged = pinned[turn][: len(part)]
                staged.copy_(part)
                target.copy_(staged, non_blocking=True)
                if stream is not None:
                    fetched[turn] = stream.record_event()
                turn = (turn + 1) % _BUFFERS
        if stream is not None:
            stream.synchronize()
