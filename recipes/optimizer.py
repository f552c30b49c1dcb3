"""AdamW, and Muon of matrices, with an average of the weights, one step of which is one CUDA graph."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, distributed, nn

from recipes.distributed import all_agree, average_over_ranks, rank, ranks
from recipes.muon import Muon


class NonFiniteLoss(RuntimeError):
    """Training has diverged."""


def _layout(p: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(p.shape), p.stride()


def _stack(flat: Tensor, same: Sequence[Tensor]) -> Tensor:
    """Matrices of one layout that follow each other in a flat buffer, (n, rows, columns)."""
    return flat.as_strided((len(same), *same[0].shape), (len(flat) // len(same), *same[0].stride()))


class GraphTrainer:
    """AdamW with float32 masters and an average of the weights, one step of which is one CUDA graph.

    The trained parameters become views of one flat buffer in the dtype of the network, gradients are gathered into
    one flat float32 buffer: clipping, the optimizer, the average and the cast back are a dozen kernels in all.
    Everything random is drawn outside and copied into the graph's inputs.

    Several processes take the same step, that of all their batches together: between the backward pass and the rest,
    each a graph of its own then, their gradients are averaged.

    Args:
        loss: takes a batch's tensors by name, returns a scalar, a mean over the batch. It may not wait for the device.
        groups: lists of parameters, each with its learning rate.
        matrices: such lists of matrices, which take Muon's steps instead of AdamW's.
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
        matrices: Sequence[tuple[Sequence[nn.Parameter], float]] = (),
        average: float = 0.999,
        graph: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        clip: float = 1.0,
    ) -> None:
        self.loss, self.average, self.clip, self.use_graph = loss, average, clip, graph
        # Matrices of one shape lie side by side, as one stack.
        stacks = [
            (list(same), rate)
            for parameters, rate in matrices
            for _, same in itertools.groupby(sorted(parameters, key=_layout), key=_layout)
        ]
        everything = [*groups, *stacks]
        self.parameters = [p for parameters, _ in everything for p in parameters]
        device = self.parameters[0].device
        # Every parameter starts at 128 bytes or more, which the fast kernels for matrices want.
        offsets, sizes, total = [], [], 0
        for parameters, _ in everything:
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

        self.base_rates = [rate for _, rate in everything]
        self.rates = [torch.zeros((), device=device) for _ in everything]
        masters = [self.master[part] for part in sizes[: len(groups)]]
        for master, part in zip(masters, sizes, strict=False):
            master.grad = self.gradient[part]
        self.optimizer = torch.optim.AdamW(
            [{"params": [m], "lr": rate} for m, rate in zip(masters, self.rates, strict=False)],
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.muon = Muon(
            [
                (_stack(self.master[part], same), _stack(self.gradient[part], same), rate)
                for part, (same, _), rate in zip(sizes[len(groups) :], stacks, self.rates[len(groups) :], strict=True)
            ],
            weight_decay=weight_decay,
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
        """Context manager: the parameters hold the averaged weights, in float32; the trained ones return at its end."""
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
        """Clip the gradient, and update masters, weights and their average."""
        norm = torch.linalg.vector_norm(self.gradient)
        finite = norm.isfinite()
        self.gradient.mul_((self.clip / (norm + 1e-6)).clamp(max=1.0))
        self.gradient.masked_fill_(~finite, 0.0)
        self.optimizer.step()
        self.muon.step()
        self.flat.copy_(self.master)
        self.averaged.lerp_(self.master, self._blend)
        zero = torch.zeros_like(norm)
        self._sums += torch.stack(
            [torch.where(finite, loss.float(), zero), torch.where(finite, norm, zero), (~finite).float()]
        )

    def _state(self) -> list[Tensor]:
        moments = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return [self.master, self.flat, self.averaged, self._sums, *moments, *self.muon.moments]

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
        # Thread-local: NCCL's watchdog, a thread of its own, may query events meanwhile.
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
