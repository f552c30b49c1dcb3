"""Layers of settings: the model's own, config files, the environment, the command line, and a job's own line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emt.backbone import PUBLISHED, module_of
from emt.errors import EmtError
from emt.hub import parse_hub, split_scale
from emt.presets import PRESETS, SCHEDULER_DEFAULTS, preset_values
from emt_cli.batch.inputs.references import ReferencePaths
from emt_cli.batch.inputs.shapes import Shapes
from emt_cli.batch.options import (
    ALL_FRAMES,
    REFERENCE_SIZE,
    Settings,
    check_sound,
    check_together,
    parse_field,
    usage_errors,
)
from emt_cli.text import nearest


@dataclass(frozen=True)
class SettingLayers:
    """Settings of jobs whose own lines set some: those over the command line's, and all of them over the model's.

    Attributes:
        defaults: The model's own.
        given: Those of the command line.
        shapes: Shapes of the model's clips.
        references: Fetches a reference on which settings depend.
        background: Those of config files and of the environment, the weakest first.
        presets: The user's own: values by setting.
        say: Called with a line where a LoRA sets the sampling.
    """

    defaults: Mapping[str, Any]
    given: Mapping[str, Any]
    shapes: Shapes
    references: ReferencePaths
    background: Sequence[Mapping[str, Any]] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    _said: set[tuple[str, str]] = field(default_factory=set)
    _made: dict[tuple[Any, ...], Settings] = field(default_factory=dict)

    def settings(self, own: Mapping[str, Any], reference: Path) -> Settings:
        """The settings of a job whose own line sets some: it wins over the command line, and both over presets.

        Jobs with the same share one object.

        Raises:
            EmtError: they exclude each other, or depend on the reference, which cannot be read.
        """
        key = (*own.items(), reference if self.look_at_references(own) else None)
        if key not in self._made:
            self._made[key] = self._make(own, reference)
        return self._made[key]

    def forget(self) -> None:
        """Make the settings anew: a reference, on which they may depend, may be another one now."""
        self._made.clear()

    def look_at_references(self, own: Mapping[str, Any]) -> bool:
        """Return whether settings of a job whose own line sets some may depend on its reference."""
        layers = (own, self.given, *self.background, *self.presets.values())
        return any(layer.get("size") == REFERENCE_SIZE or layer.get("frames") == ALL_FRAMES for layer in layers)

    def _make(self, own: Mapping[str, Any], reference: Path) -> Settings:
        values: Mapping[str, Any] = {}
        for layer in (*self.background, self._over(self.given, own, reference)):
            if "preset" in layer:  # it wins over what a weaker source sets
                values = self._over(values, self.preset(layer["preset"]), reference)
            values = self._over(values, layer, reference)
        if values.get("frames") == ALL_FRAMES:
            part = {name: values.get(name, getattr(Settings, name)) for name in ("start", "duration", "stride")}
            values = {**values, "frames": self.shapes.frames(self.references.fetch(reference), **part)}
        check_sound(values)
        models = self.defaults.get("scheduler", Settings.scheduler)
        made_for = self._few_steps(values)
        chosen = values.get("scheduler", made_for.get("scheduler", models))
        own = {} if chosen is models else SCHEDULER_DEFAULTS.get(chosen.value, {})
        own = {name: parse_field(name, value) for name, value in own.items()}
        return Settings(**{**self.defaults, **own, **made_for, **values})

    def _few_steps(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The sampling that the first distilled LoRA of a clip is made for, which is said once."""
        sources = [split_scale(text)[0] for text in values.get("lora", ())]
        names = [source if parse_hub(source) else re.split(r"[/\\]", source)[-1] for source in sources]
        few = module_of(PUBLISHED, "few_steps").find_few_steps(names) if names else None
        if few is None:
            return {}
        made_for = {"scheduler": few.sampler, "steps": few.steps, "guidance": few.guidance}
        made_for = {name: parse_field(name, value) for name, value in made_for.items() if name not in values}
        words = " ".join(f"--{name} {getattr(value, 'value', value)}" for name, value in made_for.items())
        if words and (few.title, words) not in self._said:
            self._said.add((few.title, words))
            self.say(f"note: a LoRA of {few.title}: {words} (options of the clip change them)")
        return made_for

    def _over(self, weaker: Mapping[str, Any], layer: Mapping[str, Any], reference: Path) -> dict[str, Any]:
        """Settings of a layer over those of a weaker one; a size and a width or height take each other's place."""
        weaker, layer = self._sized(weaker, reference), self._sized(layer, reference)
        replaced = {"size"} if "size" not in layer and {"width", "height"} & layer.keys() else set()
        return {**{name: value for name, value in weaker.items() if name not in replaced}, **layer}

    def _sized(self, given: Mapping[str, Any], reference: Path) -> Mapping[str, Any]:
        """Settings with the width and height that their size stands for."""
        if not given.get("size"):
            return given
        width, height = self.shapes.size(given["size"], self._looked_at(given["size"], reference))
        return {**given, "width": width, "height": height}

    def _looked_at(self, size: str, reference: Path) -> Path:
        return self.references.fetch(reference) if size == REFERENCE_SIZE else reference

    def check_layers(self) -> None:
        """Check what the command line, the environment and config files set.

        Raises:
            UsageError: there is no such preset, or settings of one of them exclude each other.
        """
        with usage_errors():
            for layer in (*self.background, self.given, *self.presets.values()):
                check_together(layer)
                if "preset" in layer:
                    self.preset(layer["preset"])

    def preset(self, name: str) -> Mapping[str, Any]:
        """Values of a preset, of emt or the user's own."""
        if name in self.presets:
            return self.presets[name]
        if name not in PRESETS:
            known = (*PRESETS, *self.presets)
            near = f"Did you mean {close}? " if (close := nearest(name, known)) else ""
            allowed = f"{near}Allowed are {', '.join(known)}, and what a config file defines."
            raise EmtError(f"there is no preset {name!r:.100}", allowed)
        values = preset_values(name, self.defaults.get("steps", Settings.steps))
        return {name: parse_field(name, value) for name, value in values.items()}
