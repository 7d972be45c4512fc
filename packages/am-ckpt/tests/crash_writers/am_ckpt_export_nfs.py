"""am_ckpt_export.py on a file system that cannot exchange two folders in one step, as NFS: for crash_matrix.py."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import am_ckpt._copy.publish

_export = runpy.run_path(str(Path(__file__).with_name("am_ckpt_export.py")))


def save(folder, value):
    am_ckpt._copy.publish.exchange = lambda one, other: False
    _export["save"](folder, value)


def load(folder):
    # There is a moment without the folder; what was there is complete beside it, and the next save_hf puts it back.
    name = "export" if os.path.exists(f"{folder}/export") else ".export-replaced"
    return _export["load"](folder, name)
