"""Write a small model folder with random weights: it shows noise, but goes through everything that a trained one does.

python examples/untrained_model.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from emt.weights import random_model

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if not Path(sys.argv[1]).exists():
        random_model(sys.argv[1], frames=16, height=128, width=128, steps=10)
    print(sys.argv[1])
