"""Going on with a merge that was interrupted after its first tensor: for crash_matrix.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import am_ckpt

_merge = runpy.run_path(str(Path(__file__).with_name("am_ckpt_merge.py")))
load = _merge["load"]


def setup(folder):
    _merge["setup"](folder)

    def interrupt(done, total):
        assert done < total
        raise KeyboardInterrupt

    try:
        merge(folder, progress=interrupt)
    except KeyboardInterrupt:
        assert Path(folder, ".merged.merging", "journal.jsonl").read_text().count("\n") == 2
        return
    raise AssertionError("the merge was not interrupted")


def merge(folder, progress=None):
    # A cast, so that every tensor is a piece of work of its own.
    return am_ckpt.merge(
        f"{folder}/step_000002", f"{folder}/merged", dtype="bfloat16", threads=1, resume=True, progress=progress
    )


def save(folder, value):
    merge(folder)
