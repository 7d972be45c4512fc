"""save_hf over an older export: for crash_matrix.py."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

import am_ckpt


def save(folder, value):
    model = torch.nn.Linear(64, 64)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    am_ckpt.save_hf(model, f"{folder}/export", files={"config.json": f'{{"value": {value}}}'})


def load(folder, name="export"):
    tensors = load_file(f"{folder}/{name}/model.safetensors")
    assert set(tensors) == {"weight", "bias"}
    with open(f"{folder}/{name}/config.json") as file:
        (digit,) = (letter for letter in file.read() if letter.isdigit())
    assert {value for tensor in tensors.values() for value in tensor.unique().tolist()} == {float(digit)}
    return int(digit)
