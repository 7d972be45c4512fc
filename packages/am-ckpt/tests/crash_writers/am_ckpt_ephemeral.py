"""An ephemeral step becomes permanent, an older one goes, and a newer one is saved: for crash_matrix.py."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import am_ckpt

_sync = runpy.run_path(str(Path(__file__).with_name("am_ckpt_save.py")))


def setup(folder):
    checkpoints = am_ckpt.Checkpointer(folder)
    checkpoints.save(1, _sync["state"](1), ephemeral=True)
    checkpoints.pin(1)
    checkpoints.save(2, _sync["state"](2), ephemeral=True)
    checkpoints.unpin(1)


def save(folder, value):
    checkpoints = am_ckpt.Checkpointer(folder)
    checkpoints.make_permanent(2)
    checkpoints.save(3, _sync["state"](3), ephemeral=True)


def load(folder):
    state = _sync["state"](9)
    assert am_ckpt.Checkpointer(folder).load(state, "step_000002") == 2
    assert {float(x) for p in state["model"].parameters() for x in p.unique()} == {2.0}
    step = _sync["load"](folder)
    if step == 3:
        assert "ephemeral" not in json.loads(Path(folder, "step_000002/manifest.json").read_text())
    return step - 1
