"""LoRAs of an open pipeline, by the names of diffusers' loader: merged into the weights, exactly, and taken out again.

diffusers' own loader lets PEFT replace layers by others that compute a LoRA beside them. Layers of these networks read
each other's weights, fused and from kernels, which would not see it. So a LoRA is merged, as `emt import-weights` and
`--lora` merge it: every layout that they read is read, the time of a clip stays, and CUDA graphs and engines take it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from emt.backbone import SWITCHING, module_of
from emt.errors import EmtError


class LoraInterface:
    """Part of `MotionTransferPipeline` that loads LoRAs and sets their weights as diffusers' pipelines do."""

    unet: Any
    text_encoder: Any
    vae: Any
    _switch: Any = None  # the `WeightSwitch`, once something was loaded
    _folder: tempfile.TemporaryDirectory[str] | None = None  # files of tensors that were given
    _loras: dict[str, str | Path]  # files by name of the adapter
    _active: dict[str, float]  # weights by name
    _disabled: dict[str, float]  # of `disable_lora`, until others are active

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
    ) -> None:
        """Load a LoRA and merge it with weight 1, beside those that are active.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder or hub id with `weight_name`, an hf:// address, or
                tensors by key.
            adapter_name: for `set_adapters`; None for `default_0`, `default_1`, ….
            weight_name: a file in the folder or repository.

        Raises:
            TypeError: it is none of these.
            ValueError: there is an adapter of that name.
            EmtError: for a file that does not fit, or a network that takes none; then the pipeline is as it was.
        """
        known = self._known()
        name = adapter_name or next(n for i in range(len(known) + 1) if (n := f"default_{i}") not in known)
        if name in known:
            raise ValueError(f"there is an adapter {name!r}: give another adapter_name, or delete_adapters first")
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, str | Path | Mapping):
            allowed = "allowed are a file, a folder, a hub id and tensors by key"
            raise TypeError(f"pretrained_model_name_or_path_or_dict is {source!r}, {allowed}")
        lora: Any = source  # its file or address
        if isinstance(source, Mapping):
            self._folder = self._folder or tempfile.TemporaryDirectory()  # it is gone with the pipeline
            lora = Path(self._folder.name) / f"{len(list(Path(self._folder.name).iterdir()))}.safetensors"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in source.items()}, lora)
        elif weight_name and Path(source).is_dir():
            lora = Path(source) / weight_name
        elif not Path(source).exists() and not str(source).startswith("hf://") and str(source).count("/") == 1:
            lora = f"hf://{source}/{weight_name}" if weight_name else f"hf://{source}"
        active = {**self._active, name: 1.0} if known else {name: 1.0}
        self._merge({**known, name: lora}, active)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Have these LoRAs in the weights, and no others.

        Args:
            adapter_names: of `load_lora_weights`.
            adapter_weights: of each, or one of all; None for 1.

        Raises:
            TypeError: a weight is no number: there are none for parts of a network.
            ValueError: there is no such adapter, or the lists differ in length.
            EmtError: a weight is beyond the pipeline's dtype; then the pipeline is as it was.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given: list[Any] = (
            list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        )
        weights = [1.0 if weight is None else weight for weight in given]
        if wrong := [w for w in weights if isinstance(w, bool) or not isinstance(w, Real)]:
            raise TypeError(f"adapter_weights has {wrong[0]!r}, allowed are numbers: one for all, or one for each")
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights has {len(weights)} entries, expected 1 or {len(names)}")
        known = self._known()
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"there is no adapter {missing[0]!r}, loaded are: {', '.join(known) or 'none'}")
        self._merge(known, dict(zip(names, weights)))

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs that are in the weights."""
        return list(self._active) if self._known() else []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all that were loaded, by the part of the pipeline."""
        return {"unet": list(self._known())} if self._known() else {}

    def disable_lora(self) -> None:
        """Take all LoRAs out of the weights; `enable_lora` and `set_adapters` put them in again."""
        disabled = (self._active or self._disabled) if self._known() else {}
        self._merge(self._known(), {})
        self._disabled = disabled

    def enable_lora(self) -> None:
        """Have the LoRAs in the weights again that `disable_lora` took out."""
        if self._known() and self._disabled:
            self._merge(self._known(), self._disabled)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget LoRAs, and take them out of the weights.

        Raises:
            ValueError: there is no such adapter.
        """
        names, known = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names), self._known()
        if missing := sorted(names - known.keys()):
            raise ValueError(f"there is no adapter {missing[0]!r}, loaded are: {', '.join(known) or 'none'}")
        active, disabled = (
            {name: weight for name, weight in weights.items() if name not in names}
            for weights in ((self._active, self._disabled) if known else ({}, {}))
        )
        self._merge({name: lora for name, lora in known.items() if name not in names}, active)
        self._disabled = disabled

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs; the weights are those that the pipeline was opened with, to the bit."""
        self._merge({}, {})

    def _known(self) -> dict[str, str | Path]:
        return self._loras if self._switch is not None else {}

    def _merge(self, loras: dict[str, str | Path], active: dict[str, float]) -> None:
        """Have the active ones of some LoRAs in the weights."""
        if self._switch is None:
            if not loras:
                return
            network = type(self.unet).__name__
            if network not in SWITCHING:
                hint = "Merge it into a model folder: emt import-weights --lora"
                raise EmtError(f"a {network} takes no LoRA while it is open", hint)
            self._switch = module_of(network, "switching").WeightSwitch(self)
            self._loras, self._active, self._disabled = {}, {}, {}  # as long as nothing could be loaded
        if any(p.is_meta for part in (self.text_encoder, self.vae) for p in part.parameters()):
            raise ValueError("weights are offloaded layer by layer: load LoRAs before enable_sequential_cpu_offload")
        self._switch.keep_words()
        self._switch.set([(loras[name], weight) for name, weight in active.items()])
        self._loras, self._active, self._disabled = loras, active, {}
