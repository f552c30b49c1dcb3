"""Time kernels against the memory they move and against PyTorch, at the sizes of Stable Diffusion 1.5, on one GPU.

    python benchmarks/kernels.py temporal_attention [--sweep] [--output table.json]

A share is the time of a device copy that moves as many bytes, over the time of the kernel; every byte that has to be
read or written is counted once. The caches are cleared before every call. `--sweep` runs every way to divide the work.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from emt_kernels import temporal_attention as temporal

Row = dict[str, Any]


def milliseconds(work: Callable[[], object]) -> float:
    """Median time of `work` on the device, with cold caches."""
    return triton.testing.do_bench(work, warmup=10, rep=60, quantiles=[0.5])


def copy_milliseconds(moved: int) -> float:
    """Median time of a device copy that moves so many bytes, read and written together."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source))


def figures(time: float, copy: float, moved: int) -> Row:
    """Columns that every table has."""
    return {"ms": round(time, 4), "GB/s": round(moved / time / 1e6), "share of copy": round(copy / time, 3)}


# ------------------------------------------------------------------------------------------- temporal_attention

FRAMES, CLIPS = 16, 2
LEVELS = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # tokens, head size


def temporal_attention(sweep: bool) -> Iterator[Row]:
    """Two clips (guidance) of 16 frames with and without one reference, 8 heads."""
    for tokens, head_size in LEVELS:
        for reference in (True, False):
            yield from _level(tokens, head_size, 8, reference, sweep)


def _level(tokens: int, head_size: int, heads: int, reference: bool, sweep: bool) -> Iterator[Row]:
    channels = heads * head_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float16, device="cuda")

    arguments: list[Any] = [*(normal(CLIPS, FRAMES, tokens, channels) for _ in range(3)), heads]
    if reference:
        arguments += [normal(1, FRAMES, tokens, channels) for _ in range(2)]
        arguments += [normal(FRAMES, channels) for _ in range(2)]
        arguments += [torch.rand(CLIPS, FRAMES, tokens, device="cuda").half()]
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    moved = sum(x.numel() * x.element_size() for x in (*tensors, arguments[0]))
    copy = copy_milliseconds(moved)
    case = {"pixels × heads × size": f"{CLIPS * tokens}×{heads}×{head_size}", "reference": reference}
    sdpa = milliseconds(lambda: temporal.temporal_attention_reference(*arguments))
    yield case | {"design": "scaled_dot_product_attention"} | figures(sdpa, copy, moved) | {"× SDPA": 1.0}

    exact = temporal.temporal_attention_reference(*(x.float() if isinstance(x, Tensor) else x for x in arguments))
    rows = 3 * FRAMES + (2 * FRAMES if reference else 0)
    shipped = temporal.plan(heads, head_size, rows, 2)
    for chosen in dict.fromkeys([shipped, *(_plans(shipped, head_size) if sweep else ())]):

        def work(chosen: temporal.Plan = chosen) -> Tensor:
            return temporal.launch(*arguments, chosen=chosen)

        try:
            error = (work().float() - exact).abs().max().item()
            time = milliseconds(work)
        except triton.OutOfResources:
            continue
        yield (
            case
            | {"design": "shipped" if chosen == shipped else "plan"}
            | asdict(chosen)
            | figures(time, copy, moved)
            | {"× SDPA": round(sdpa / time, 2), "largest error": round(error, 5)}
        )


def _plans(shipped: temporal.Plan, head_size: int) -> Iterator[temporal.Plan]:
    whole = max(triton.next_power_of_2(head_size), 16)
    for columns in (shipped.columns, whole) if head_size < 64 else (shipped.columns,):
        for heads, warps in ((1, 1), (2, 1), (2, 2), (4, 4), (8, 8)):
            for stages in (1, 2, 3):
                if heads * max(stages - 1, 1) * head_size > 1000:  # more shared memory than there is
                    continue
                for pixels in (4, 16) if stages > 1 else (1, 4, 16):  # one compilation serves all of them
                    yield replace(shipped, heads=heads, warps=warps, stages=stages, columns=columns, pixels=pixels)


# -------------------------------------------------------------------------------------------------------- tables

KERNELS: dict[str, Callable[[bool], Iterator[Row]]] = {"temporal_attention": temporal_attention}


def main(command_line: list[str] | None = None) -> None:
    """Print a row for every measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--sweep", action="store_true", help="every way to divide the work, not only the shipped one")
    parser.add_argument("--output", type=Path, help="write the rows as JSON, too")
    given = parser.parse_args(command_line)
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    rows = []
    for row in KERNELS[given.kernel](given.sweep):
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if given.output:
        given.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
