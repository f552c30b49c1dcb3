"""In-place matmul-accumulate as an operator that compilers leave alone.

cuBLAS accumulates into its output without a copy (beta = 1). A compiler that sees `x + a @ b` copies `x` first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emt_kernels.selection import custom_op


def add_matmul_(out: Tensor, weight: Tensor, x: Tensor) -> None:
    """Add the matmul ``x @ weight.T`` to `out`, in place.

    Args:
        out: (rows, features).
        weight: (features, channels), as `torch.nn.Linear` has it.
        x: (rows, channels).
    """
    if torch.compiler.is_compiling():
        torch.ops.emt.add_matmul_(out, weight, x)
    else:
        out.addmm_(x, weight.t())


# Compiled code calls the operator, whose body then runs eagerly: is_compiling() is false there.
_operator = custom_op("emt::add_matmul_", mutates_args={"out"})(add_matmul_)


@_operator.register_fake
def _(out: Tensor, weight: Tensor, x: Tensor) -> None:
    pass
