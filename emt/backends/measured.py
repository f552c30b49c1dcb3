"""A backend whose computing is measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from emt.backends.base import Backend

#: Methods of a backend that compute on the device.
_COMPUTE = frozenset(
    (
        "encode_reference",
        "prepare_motion",
        "denoise",
        "denoise_controlled",
        "denoise_deep",
        "denoise_shallow",
        "encode_images",
        "decode_images",
    )
)


class MeasuredBackend:
    """A backend that runs inside a context whatever computes on the device; all else is the backend's own.

    Args:
        backend: which computes.
        computing: makes a context manager for each call, such as `emt.device.BusyClock`.
    """

    def __init__(self, backend: Backend, computing: Callable[[], AbstractContextManager[Any]]) -> None:
        self.measured, self._computing = backend, computing

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.measured, name)
        if name not in _COMPUTE:
            return found

        def call(*args: Any, **options: Any) -> Any:
            with self._computing():
                return found(*args, **options)

        return call
