"""torch.save over the file before: for crash_matrix.py."""

from __future__ import annotations

import torch


def save(folder, value):
    torch.save({"weight": torch.full((64, 64), float(value)), "step": value}, f"{folder}/checkpoint.pt")


def load(folder):
    loaded = torch.load(f"{folder}/checkpoint.pt", weights_only=True)
    assert set(loaded["weight"].unique().tolist()) == {float(loaded["step"])}
    return loaded["step"]
