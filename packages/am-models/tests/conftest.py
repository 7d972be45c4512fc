"""Makes `tiny_models` importable: pytest's importlib mode does not put test folders on the path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

# Tiny models: a second thread costs more than it computes, most of all on a busy machine.
torch.set_num_threads(1)
