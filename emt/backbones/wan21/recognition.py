"""Recognition of Wan among what `emt import-weights --base` is given, without torch and without fetching anything."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from emt.checkpoints import read_config
from emt.hub import parse_hub

_BLOCK = re.compile(r"(\w+\.)*blocks\.\d+\.(self_attn|cross_attn|attn[12])\.")
# The same among the bytes of a pickle; not within names of another network, such as `transformer_blocks.`.
_PICKLED_BLOCK = re.compile(rb"(?<![A-Za-z_])blocks\.\d+\.(self_attn|cross_attn|attn[12])\.")
_NAMES_BYTES = 1 << 24  # of a pickle, its beginning: tensors are beside it, names before them in what is older


def recognizes(base: str | Path) -> bool:
    """True for a Wan of whatever kind: by its name on the hub, its folder's files or the names of its weights."""
    path = Path(base)
    if not path.exists():
        place = parse_hub(base)
        return "wan" in (place.repo if place else str(base)).lower()
    if path.is_file():
        return _has_wan_names(path)
    index = path / "model_index.json"
    if index.is_file():
        return str(read_config(index)[0].get("_class_name")).startswith("Wan")
    shards = sorted(path.glob("*.safetensors"))
    return (path / "Wan2.1_VAE.pth").is_file() or bool(shards and _has_wan_names(shards[0]))


def _has_wan_names(path: Path) -> bool:
    """Return whether a file of safetensors or torch.save, whatever it is called, has weights of Wan."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                return any(_PICKLED_BLOCK.search(archive.open(name).read(_NAMES_BYTES)) for name in names)
        with path.open("rb") as pickled:
            if pickled.read(1) == b"\x80":
                return _PICKLED_BLOCK.search(pickled.read(_NAMES_BYTES)) is not None
        with safe_open(path, framework="np") as file:
            return any(_BLOCK.match(name) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False
