from __future__ import annotations

import os

# Model hubs are never asked: a test that would is a test that fails without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
