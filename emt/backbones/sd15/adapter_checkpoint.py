"""Reading of an adapter's checkpoint, which may hold any weight of the network.

EfficientMT's training configuration selects trained layers by name: `to_q`, `to_k`, `to_v` and `scaler` in the up
blocks. Its loader reads every key that the network has into the network that denoises; another one reads the reference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from emt.backbones.sd15.checkpoint_kinds import ADAPTER, one_prefix, read_kind
from emt.backbones.sd15.network import MotionTransferNetwork, without_positions
from emt.checkpoints import Checkpoint, Origin, State, naming_file
from emt.errors import EmtError
from emt.hub import OnFetch, locate

#: Kinds of layers that a model card lists one by one.
_LISTED = 8


@dataclass
class AdapterCheckpoint:
    """An adapter's weights by published names: of what EfficientMT trains, and of other layers that denoise.

    Attributes:
        state: the weights.
        blocks: up blocks that take the reference, 0 the lowest.
        origin: where they came from.
    """

    state: State
    blocks: list[int]
    origin: Origin

    def note_use(self, unet: MotionTransferNetwork) -> None:
        """Say in the origin which weights the network took and how, after `MotionTransferNetwork.load_published`."""
        trained = unet.published_shapes().adapter.keys() & self.state.keys()
        own = unet.config.denoising_layers or []
        taken = {name for name in self.state if name.rpartition(".")[0] in set(own)}
        equal = len(self.state) - len(trained) - len(taken)
        note = f"{len(trained)} trained tensors, up blocks {', '.join(map(str, self.blocks))}"
        if own:
            note += f"; {len(own)} more layers, which denoise while the base's read the reference: {_kinds(own)}"
        if equal:
            note += f"; {equal} tensors equal the base's"
        self.origin.note = note


def read_adapter(adapter: str | Path, on_fetch: OnFetch | None = None) -> AdapterCheckpoint:
    """Read an adapter: EfficientMT's checkpoint, of a whole network or a part of it, or a network of `emt train`.

    A network of `emt train` names the trained layers apart from its backbone, which is not taken.

    Raises:
        EmtError: if the file is missing, damaged or of another kind.
    """
    path = locate(adapter, "adapter", on_fetch=on_fetch)
    if path.is_dir():
        raise EmtError(f"the adapter {path} is a folder", "Give the adapter's .ckpt or .safetensors file.")
    checkpoint = read_kind(path, ADAPTER, own=_without_prefix)
    state, dropped = naming_file(path, without_positions, checkpoint.state), list(checkpoint.dropped)
    blocks = sorted({int(m[1]) for name in state if (m := re.match(r"up_blocks\.(\d+)\..*\.scaler\.", name))})
    if any(".adapter." in name or name.startswith("denoising.") for name in state):
        own = {n: t for n, t in state.items() if re.search(r"\.adapter\.|\.scaler\.|^denoising\.", n)}
        dropped += [name for name in state if name not in own]
        state = {name.replace(".adapter.", ".").removeprefix("denoising."): tensor for name, tensor in own.items()}
    return AdapterCheckpoint(state, blocks, Origin("adapter", str(adapter), [path], "", dropped))


def _without_prefix(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """A file with the network that has an adapter, without what is before its names; all else is dropped."""
    state = checkpoint.state
    prefixes = Counter(
        m[1] for name in state if (m := re.match(r"(.*?)(?:denoising\.)?up_blocks\.\d+\..*\.scaler\.", name))
    )
    if not prefixes:
        return checkpoint
    prefix = one_prefix(path, ADAPTER, prefixes)
    copies = tuple(other for other in prefixes if other and other != prefix)
    # Beside a network below a prefix are others; what is beside one that has none is to be read or an error.
    own = {name for name in state if name.startswith(prefix) and not (copies and name.startswith(copies))}
    taken = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name in own}
    beside = [name for name in state if name not in own]
    return Checkpoint(taken, checkpoint.metadata, [*checkpoint.dropped, *beside])


def _kinds(paths: Iterable[str]) -> str:
    """Kinds of layers, with N for the numbers in their paths, and how many there are of each."""
    counts = Counter(re.sub(r"\b\d+\b", "N", path) for path in paths)
    listed = [f"`{kind}` ({count})" for kind, count in sorted(counts.items())]
    more = [f"and {len(listed) - _LISTED} kinds more"] if len(listed) > _LISTED else []
    return ", ".join([*listed[:_LISTED], *more])
