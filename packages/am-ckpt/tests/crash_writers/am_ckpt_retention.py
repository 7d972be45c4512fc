"""A save that deletes one of three steps, keeps the best and a pinned one: for crash_matrix.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import am_ckpt

_sync = runpy.run_path(str(Path(__file__).with_name("am_ckpt_save.py")))
# Whatever happened to the step before the one that is loaded, these two are never touched.
KEPT = {3: "pinned", 4: "best"}


def _checkpointer(folder):
    return am_ckpt.Checkpointer(folder, keep_last=1, keep_best=("loss", "min", 1))


def setup(folder):
    keep_all = am_ckpt.Checkpointer(folder)
    for step in (*KEPT, 5):
        keep_all.save(step, _sync["state"](step), metrics={"loss": 0.0 if step == 4 else 1.0})
    keep_all.pin(3)


def save(folder, value):
    _checkpointer(folder).save(6, _sync["state"](6), metrics={"loss": 1.0})


def load(folder):
    for step in KEPT:
        state = _sync["state"](9)
        assert _checkpointer(folder).load(state, f"step_{step:06d}") == step
        assert {float(x) for p in state["model"].parameters() for x in p.unique()} == {float(step)}
    return _sync["load"](folder) - 4
