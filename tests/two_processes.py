"""Training in two processes: each imports this in place of all that the tests of the recipes import."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from recipes.optimizer import GraphTrainer, NonFiniteLoss
from recipes.stage import Stage, stage_parser, train


def trained(model: nn.Linear, part: slice) -> tuple[GraphTrainer, float]:
    """A trainer after six steps on `part` of each of six batches, and the mean loss of the last."""
    generator = torch.Generator().manual_seed(1)
    trainer = GraphTrainer(lambda x: model(x).square().mean(), [(list(model.parameters()), 1e-2)])
    for _ in range(6):
        trainer.step({"x": torch.randn(8, 5, generator=generator)[part]}, 1.0)
        loss = trainer.read()["loss"]
    return trainer, loss


def in_two_processes(work: Callable[[int, Path], None], folder: Path) -> None:
    """Call `work` with its rank in each of two processes that train together, of which this is the first."""
    other = multiprocessing.get_context("forkserver").Process(target=_one_of_two, args=(1, work, folder))
    other.start()
    _one_of_two(0, work, folder)
    other.join()
    assert other.exitcode == 0


def _one_of_two(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    # One that has failed is not waited for much longer.
    options = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": 2, "timeout": timedelta(minutes=2)}
    distributed.init_process_group("gloo", **options)
    try:
        work(rank, folder)
    finally:
        distributed.destroy_process_group()


def train_half(rank: int, folder: Path) -> None:
    torch.manual_seed(rank)  # the weights are those of the first
    model = nn.Linear(5, 3)
    if rank == 0:
        torch.save(copy.deepcopy(model), folder / "start.pt")
    trainer, loss = trained(model, slice(4 * rank, 4 * rank + 4))
    assert trainer.apart() == 0
    torch.save((trainer.master, trainer.averaged, loss), folder / f"{rank}.pt")

    # What is not finite in one process is skipped in both.
    before = trainer.master.clone()
    trainer.step({"x": torch.full((4, 5), float("nan") if rank else 1.0)}, 0.0)
    assert torch.equal(trainer.master, before)
    with pytest.raises(NonFiniteLoss):
        trainer.read()
    trainer.master[0] += rank
    assert trainer.apart() == pytest.approx(1, rel=1e-3)

    # The first has the clock. The other one's own, which never ends, does not count.
    minutes = "1e9" if rank else "0.01"
    stage = Stage("clock", stage_parser(None, 0, 4).parse_args(["--out", str(folder), "--minutes", minutes]))
    trainer = GraphTrainer(lambda x: model(x).square().mean(), [(list(model.parameters()), 1e-2)])
    train(stage, trainer, lambda: {"x": torch.randn(4, 5, generator=stage.generator)})
    torch.save((trainer.step_count, trainer.master, stage.generator.initial_seed()), folder / f"clock-{rank}.pt")
