from __future__ import annotations

import gc
import logging
import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from weight_files import Files

# Model hubs are never contacted: a test that would is a test that fails without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


#: Files that take longest, begun in this order: those of a few seconds then fill the time until all workers end.
LONGEST = """
engines cli_transfer recipes network train tensorrt onnx evaluate_judge recipes_dit fleet object_storage wan21_pipeline
wan21_weights demo evaluate_cli kernel_add_matmul report weights streams package kernel_norms teacher hub
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by files, the longest first."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Have the garbage collector not look through the libraries and the thousands of tests: a third of the start."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def logging_is_left_as_it_was() -> Iterator[None]:
    """Check of every test: one that silences logging for good makes warnings vanish in those after it."""
    before = logging.root.manager.disable, logging.root.level
    yield
    after = logging.root.manager.disable, logging.root.level
    logging.disable(before[0])
    logging.root.setLevel(before[1])
    assert after == before, "the test left another level of logging behind"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The published files at a small width."""
    from weight_files import Files

    return Files(tmp_path_factory.mktemp("files"))
