"""The Checkpointer in the background, with retention: for crash_matrix.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import am_ckpt

_sync = runpy.run_path(str(Path(__file__).with_name("am_ckpt_save.py")))
load = _sync["load"]


def save(folder, value):
    checkpoints = am_ckpt.Checkpointer(folder, keep_last=1, asynchronous=True)
    checkpoints.save(value, _sync["state"](value))
    checkpoints.wait()
