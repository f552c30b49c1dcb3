"""A product that adds to a matrix where it lies, as an operator that compilers keep as it is.

cuBLAS adds to what is there already. A compiler that knows only the sum would copy the matrix first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, weight: Tensor, x: Tensor) -> None:
    """Add ``x · weightᵀ`` to `total`, in place.

    Args:
        total: (rows, features).
        weight: (features, channels), as `torch.nn.Linear` has it.
        x: (rows, channels).
    """
    if torch.compiler.is_compiling():
        torch.ops.emt.add_product(total, weight, x)
    else:
        total.addmm_(x, weight.t())


# What compiled code calls is not compiling.
_operator = torch.library.custom_op("emt::add_product", add_product, mutates_args={"total"})


@_operator.register_fake
def _(total: Tensor, weight: Tensor, x: Tensor) -> None:
    pass
