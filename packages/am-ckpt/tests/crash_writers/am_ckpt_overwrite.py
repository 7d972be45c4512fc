"""Merging over an older merge: for crash_matrix.py. What is there before are two steps, and a merge of the first."""

from __future__ import annotations

import runpy
from pathlib import Path

from safetensors.torch import load_file

import am_ckpt

_sync = runpy.run_path(str(Path(__file__).with_name("am_ckpt_save.py")))


def setup(folder):
    checkpoints = am_ckpt.Checkpointer(folder)
    for value in (1, 2):
        checkpoints.save(value, _sync["state"](value))
    save(folder, 1)


def save(folder, value):
    am_ckpt.merge(f"{folder}/step_{value:06d}", f"{folder}/merged", overwrite=True, resume=True)


def load(folder):
    tensors = load_file(f"{folder}/merged/model.safetensors")
    assert set(tensors) == {"weight", "bias"}
    (value,) = {value for tensor in tensors.values() for value in tensor.unique().tolist()}
    return int(value)
