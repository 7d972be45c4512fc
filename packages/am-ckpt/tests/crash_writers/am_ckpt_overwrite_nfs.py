"""am_ckpt_overwrite.py on a file system that cannot exchange two folders in one step, as NFS: for crash_matrix.py."""

from __future__ import annotations

import contextlib
import runpy
from pathlib import Path

import am_ckpt
import am_ckpt._copy.publish

_overwrite = runpy.run_path(str(Path(__file__).with_name("am_ckpt_overwrite.py")))


def _without_exchange():
    am_ckpt._copy.publish.exchange = lambda one, other: False


def setup(folder):
    _without_exchange()
    _overwrite["setup"](folder)


def save(folder, value):
    _without_exchange()
    _overwrite["save"](folder, value)


def load(folder):
    _without_exchange()
    # There is a moment without the destination; the next merge to it puts back what was there.
    with contextlib.suppress(FileExistsError):
        am_ckpt.merge(f"{folder}/step_000001", f"{folder}/merged")
        raise AssertionError("nothing was there")
    return _overwrite["load"](folder)
