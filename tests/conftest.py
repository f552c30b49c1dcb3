from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from weight_files import Files

# Model hubs are never contacted: a test that would is a test that fails without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The published files at a small width."""
    from weight_files import Files

    return Files(tmp_path_factory.mktemp("files"))
