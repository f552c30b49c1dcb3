"""Changes of weights by LoRA and its relatives: plain, Tucker-decomposed, LoHa, LoKr, DoRA and full differences.

Hu et al. 2021 (arXiv 2106.09685); LoHa, LoKr and Tucker cores as LyCORIS defines them (Yeh et al. 2023,
arXiv 2309.14859, section 3 and appendix B); DoRA: Liu et al. 2024 (arXiv 2402.09353, equation 5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_MAGNITUDES = ("dora_scale", "magnitude")
_BIASES = ("diff_b", "b_norm")
_LOW_RANK_BIAS = "bias"  # of `lora_B`, PEFT's lora_bias: scaled as the change of the weight is
# Roles that a layer of a family may have; of a bias and magnitudes, any.
_OF_FAMILY = {
    "LoHa": re.compile(r"hada_[wt]\d(_[ab])?|scalar"),
    "LoKr": re.compile(r"lokr_w1_[ab]|lokr_w[12]|lokr_w2_[ab]|lokr_t2|scalar"),
    "LoRA": re.compile(r"down|up|mid|scalar"),
    "difference": re.compile(r"diff|w_norm|scalar"),
}


@dataclass
class LoraLayer:
    """A layer of a file: tensors by their roles (down, up, mid, hada_w1_a, lokr_w2, diff, …)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def family(self) -> str:
        """LoRA, LoHa, LoKr or difference."""
        for start, family in (("hada_", "LoHa"), ("lokr_", "LoKr")):
            if any(role.startswith(start) for role in self.tensors):
                return family
        if self.tensors.keys() & {"down", "up", "mid"}:
            return "LoRA"
        return "difference" if self.tensors.keys() & {"diff", "w_norm", *_BIASES} else "LoRA"

    @property
    def kind(self) -> str:
        """Its family, with DoRA before it where magnitudes are learned, too."""
        return self.family if self.magnitude is None else f"DoRA {self.family}".removesuffix(" LoRA")

    @property
    def magnitude(self) -> Tensor | None:
        """Learned norms of a DoRA layer; None of another."""
        return next((self.tensors[role] for role in _MAGNITUDES if role in self.tensors), None)

    @property
    def rank(self) -> int | None:
        """Rank of its decomposition; None of a full one."""
        for role, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
            if role in self.tensors and self.tensors[role].ndim:
                return self.tensors[role].shape[axis]
        return None

    def missing(self) -> list[str]:
        """Roles that are missing of a whole layer."""
        has = self.tensors.keys()
        if self.family == "LoHa":
            return [role for role in _LOHA if role not in has]
        if self.family == "LoKr":
            lacks = []
            for half in ("lokr_w1", "lokr_w2"):
                if half not in has:
                    lacks += [role for role in (f"{half}_a", f"{half}_b") if role not in has]
            return lacks
        if self.family == "difference":
            return []
        return [role for role in ("down", "up") if role not in has]

    def unread(self) -> list[str]:
        """Roles that its family does not read, or reads another instead of."""
        own = _OF_FAMILY[self.family]
        odd = [role for role in self.tensors if not own.fullmatch(role) and role not in (*_MAGNITUDES, *_BIASES)]
        if self.family == "LoRA" and self.magnitude is None and "diff_b" not in self.tensors:
            odd = [role for role in odd if role != _LOW_RANK_BIAS]
        if self.family == "difference" and not self.tensors.keys() & {"diff", "w_norm"}:
            odd += [role for role in (*_MAGNITUDES, "scalar") if role in self.tensors]  # they are of the weight's
        either = [("diff", "w_norm"), ("diff_b", "b_norm"), _MAGNITUDES]
        either += [(f"lokr_w{i}", f"lokr_w{i}_{half}") for i in (1, 2) for half in "ab"]
        return odd + [second for first, second in either if {first, second} <= self.tensors.keys()]

    def bias_change(self, scale: float) -> Tensor | None:
        """Change of the bias at scale 1, of a layer whose change is scaled by `scale` (alpha / rank); None for none."""
        if (change := self.tensors.get(_LOW_RANK_BIAS)) is not None:
            return scale * change.float()
        change = self.tensors.get("diff_b", self.tensors.get("b_norm"))
        return None if change is None else change.float()

    def weight_change(self, shape: torch.Size) -> Tensor | None:
        """Change of the weight in float32, before alpha and DoRA; None for none.

        Raises:
            RuntimeError, IndexError, ValueError: if the tensors do not fit each other or the shape.
        """
        t = {role: tensor.float() for role, tensor in self.tensors.items() if role not in _MAGNITUDES}
        if self.family == "difference":
            change = t.get("diff", t.get("w_norm"))
        elif self.family == "LoHa":
            first, second = (_hadamard_factor(t, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
            change = first.flatten(1) * second.flatten(1)
        elif self.family == "LoKr":
            first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
            second = t["lokr_w2"] if "lokr_w2" in t else _kronecker_factor(t)
            change = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second.contiguous())
        elif "mid" in t:
            change = torch.einsum("mn...,im,nj->ij...", t["mid"], t["up"].flatten(1), t["down"].flatten(1))
        else:
            down, up = t["down"], t["up"]
            # A linear layer's LoRA may serve a 1×1 convolution and the other way round; `up` is always pointwise.
            if math.prod(up.shape[2:]) != 1 or math.prod(down.shape[2:]) != math.prod(shape[2:]):
                raise ValueError("kernel sizes differ")
            change = up.flatten(1) @ down.flatten(1)
        if change is None:
            return None
        if change.shape[0] != shape[0] or change.numel() != shape.numel():
            raise ValueError(f"{tuple(change.shape)} for {tuple(shape)}")
        return change.reshape(shape) * t["scalar"].reshape(()) if "scalar" in t else change.reshape(shape)

    def is_zero(self, scale: float) -> bool:
        """Return whether it changes no weight, whatever the weight is, with a change scaled by `scale`."""
        sums = [t for role, t in self.tensors.items() if role in ("diff", "w_norm", *_BIASES)]
        factors = [t for role, t in self.tensors.items() if _OF_FAMILY[self.family].fullmatch(role)]
        sums += [scale * t.float() for role, t in self.tensors.items() if role == _LOW_RANK_BIAS]
        if self.magnitude is not None or any(bool(t.any()) for t in sums):
            return False
        return not scale or self.family == "difference" or not all(bool(t.any()) for t in factors)

    def fits(self, shape: torch.Size) -> bool:
        """Return whether it changes a weight of this shape."""
        try:
            meta = LoraLayer({role: tensor.to("meta") for role, tensor in self.tensors.items()})
            meta.weight_change(shape)
            if (magnitude := self.magnitude) is not None:
                self._per_axis(magnitude, torch.empty(shape, device="meta"))
        except (RuntimeError, IndexError, ValueError, KeyError):
            return False
        return True

    def change(self, weight: Tensor, scale: float) -> Tensor | None:
        """Change of a float32 weight at scale 1, of a layer whose change is scaled by `scale` (alpha / rank)."""
        change = self.weight_change(weight.shape)
        if change is None or (magnitude := self.magnitude) is None:
            return None if change is None else change * scale
        whole = weight + scale * change
        norms, axis = self._per_axis(magnitude.float(), whole)
        others = [i for i in range(whole.ndim) if i != axis]
        lengths = torch.linalg.vector_norm(whole, dim=others, keepdim=True)
        return whole * (norms / (lengths + torch.finfo(torch.float32).eps)) - weight

    def _per_axis(self, magnitude: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        """Magnitudes in a shape that multiplies a weight, and the axis that each belongs to: outputs or inputs."""
        # Vectors are of outputs; in two dimensions and more the one that is not 1 decides, as (1, in) or (out, 1).
        of_inputs = "dora_scale" in self.tensors and magnitude.ndim > 1 and magnitude.shape[0] == 1
        axis = 1 if of_inputs and weight.shape[0] != 1 else 0
        shape = [1] * weight.ndim
        shape[axis] = weight.shape[axis]
        return magnitude.reshape(shape), axis


def _hadamard_factor(t: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    if core in t:
        return torch.einsum("ij...,jr,ip->pr...", t[core], b, a)
    return a.flatten(1) @ b.flatten(1)


def _kronecker_factor(t: Mapping[str, Tensor]) -> Tensor:
    a, b = t["lokr_w2_a"], t["lokr_w2_b"]
    if "lokr_t2" in t:
        return torch.einsum("ij...,ip,jr->pr...", t["lokr_t2"], a, b)
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])
