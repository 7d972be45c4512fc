"""Merging a step into a Hugging Face folder: for crash_matrix.py. What is there before is the step alone."""

from __future__ import annotations

import runpy
from pathlib import Path

from safetensors.torch import load_file

import am_ckpt

_sync = runpy.run_path(str(Path(__file__).with_name("am_ckpt_save.py")))


def setup(folder):
    am_ckpt.Checkpointer(folder).save(2, _sync["state"](2))


def save(folder, value):
    am_ckpt.merge(f"{folder}/step_{value:06d}", f"{folder}/merged", resume=True)


def load(folder):
    assert _sync["load"](folder) == 2
    if not Path(folder, "merged").exists():
        return 1
    tensors = load_file(f"{folder}/merged/model.safetensors")
    assert set(tensors) == {"weight", "bias"}
    assert all(set(t.unique().tolist()) == {2.0} for t in tensors.values())
    return 2
