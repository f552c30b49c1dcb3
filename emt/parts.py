"""Parts of a model folder, built and filled without the libraries that wrote them.

diffusers and transformers take several times as long to import as PyTorch. What making clips needs of them is small: a
configuration, a class that is built from it, and weights by name. `emt.pipeline.MotionTransferPipeline` is diffusers'
own pipeline of the same parts, for whoever works in Python.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from emt.checkpoints import check_keys, check_varied, opened_files, read_checkpoint, without_memory, without_zeros
from emt.errors import first_line

T = TypeVar("T")
N = TypeVar("N", bound="Network")

_ALIGNMENT = 64  # bytes, of what PyTorch allocates


class Config(dict[str, Any]):
    """A configuration: a dictionary whose entries are attributes, too, as diffusers has it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no {name!r}") from None

    @classmethod
    def read(cls, file: Path) -> Config:
        """That of a JSON file.

        Raises:
            OSError: there is none.
            ValueError: it is no JSON object.
        """
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no JSON: {first_line(error)}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds a {type(content).__name__}, no configuration")
        return cls(content)


def configured(build: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a network's `__init__`: its arguments, defaults included, are `config` before it runs."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def init(self: Any, *args: Any, **options: Any) -> None:
        bound = signature.bind(self, *args, **options)
        bound.apply_defaults()
        arguments = dict(itertools.islice(bound.arguments.items(), 1, None))
        self.register_to_config(**arguments)
        build(self, *args, **options)

    return init


def offloaded(method: Callable[..., T]) -> Callable[..., T]:
    """Decorator of a network's method: brings the network to its device where accelerate moves it in and out."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> T:
        hook = self.__dict__.get("_hf_hook")
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(self)
        return method(self, *args, **options)

    return call


class Network(nn.Module):
    """A network that knows its configuration, device and dtype; `configured` decorates its `__init__`."""

    _config: Config

    @property
    def config(self) -> Config:
        """The arguments that it was built from."""
        return self._config

    def register_to_config(self, **values: Any) -> None:
        """Add entries to the configuration, or replace them."""
        self.__dict__["_config"] = Config({**self.__dict__.get("_config", {}), **values})

    @classmethod
    def from_config(cls: type[N], config: Mapping[str, Any]) -> N:
        """Build a network from the entries of a configuration that are its arguments."""
        names = inspect.signature(cls.__init__).parameters
        return cls(**{name: value for name, value in config.items() if name in names and name != "self"})

    @staticmethod
    def key(name: str) -> str:
        """The name in `state_dict` of a weight in a file."""
        return name

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())


def open_network(network: type[N], folder: Path, dtype: torch.dtype) -> N:
    """Build a network from its folder in a model folder, with the weights of its files, in evaluation mode.

    Weights whose dtype stays are mapped from the files.

    Args:
        network: its class.
        folder: with `config.json` and files of weights.
        dtype: of the weights.

    Raises:
        EmtError: weights are missing, unexpected or of another shape, which it names; a file is damaged.
        OSError: there is no configuration.
        ValueError: the configuration describes no network.
    """
    config = Config.read(folder / "config.json")
    _check_kinds(network, config, folder / "config.json")
    try:
        made = without_memory(lambda: network.from_config(config))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"no network can be built by {folder / 'config.json'}: {first_line(error)}") from error
    made.register_to_config(_name_or_path=str(folder))
    state = {network.key(name): tensor for name, tensor in _read(folder)}
    own = {name: tensor.shape for name, tensor in made.state_dict().items()}
    where = f"{folder.name} of the model {folder.parent}"
    check_keys(where, state, own)
    check_varied(where, without_zeros(made, state))
    made.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return nn.Module.to(made, dtype).eval()


# What an argument of a network may be, by its annotation; of others, building says so.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    "float": (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number from 0"),
    "bool": (lambda value: type(value) is bool, "true or false"),
}


def _check_kinds(network: type[Network], config: Config, file: Path) -> None:
    """Check entries of a configuration that networks are built by, of which some fail as late as they compute.

    Raises:
        ValueError: one is of another kind than its argument.
    """
    for name, parameter in inspect.signature(network.__init__).parameters.items():
        fits, allowed = _KINDS.get(parameter.annotation, (lambda value: True, ""))
        if name in config and not fits(config[name]):
            raise ValueError(f"{name} of {file} is {config[name]!r:.60}; allowed: {allowed}")


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in opened_files(folder):
        for name, tensor in read_checkpoint(file).state.items():
            if not name.endswith(".position_ids"):  # whole numbers that transformers once stored with the weights
                yield name, tensor


def align(network: nn.Module) -> None:
    """Copy weights in the computer's memory that do not begin where PyTorch's own tensors may, as in mapped files.

    The libraries' code for them may be slower, and may add up in another order.
    """
    for parameter in network.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
