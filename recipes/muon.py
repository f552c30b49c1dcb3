"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) over stacks of matrices of one shape.

`torch.optim.Muon` takes one matrix after another. A small transformer has a hundred small ones, whose thousand
kernels a step would cost more than its forward pass; a stack of them takes fifteen.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are about 1 (0.7 to 1.2), by five Newton-Schulz iterations.

    Args:
        matrices: (n, rows, columns), float32.

    Returns:
        As `matrices`, in bfloat16 on a GPU.
    """
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon:
    """Gradient descent by orthogonalized momentum, with Nesterov's look ahead and decoupled weight decay.

    Updates are as large as AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that both take one rate.

    Args:
        stacks: matrices and their gradients, (n, rows, columns) each, changed in place, and the learning rate of each
            stack, a scalar tensor.
        momentum: of the gradients.
        weight_decay: times the rate, of the weights.
    """

    def __init__(
        self, stacks: list[tuple[Tensor, Tensor, Tensor]], *, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        self.stacks, self.momentum, self.weight_decay = stacks, momentum, weight_decay
        self.moments = [torch.zeros_like(matrices) for matrices, _, _ in stacks]

    @torch.no_grad()
    def step(self) -> None:
        """Descend by the gradients as they are."""
        for (matrices, gradients, rate), moment in zip(self.stacks, self.moments, strict=True):
            moment.lerp_(gradients, 1 - self.momentum)
            update = orthogonalized(gradients.lerp(moment, self.momentum))
            matrices.mul_(1 - rate * self.weight_decay)
            matrices.sub_(rate * 0.2 * max(matrices.shape[1:]) ** 0.5 * update.float())
