"""One process at a time owns a run directory, until it ends, however that happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from am_recipes import lock

HOLDER = """
import pathlib, sys, time
from am_recipes import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(run_dir):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_another_process_is_refused_and_told_who_has_it_until_that_is_killed(tmp_path):
    run_dir = tmp_path / "runs" / "a"
    with holder(run_dir) as process:
        before = {path: path.read_bytes() for path in run_dir.iterdir()}
        with pytest.raises(lock.Refused, match=rf"a is in use by process {process.pid} on \S+ since .*: .*python.* -c"):
            lock.held(run_dir).__enter__()
        assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        # What it has left is taken over.
        assert [path.name for path in run_dir.iterdir()] == [lock.NAME]
        with lock.held(run_dir):
            assert f'"process": {os.getpid()}' in (run_dir / lock.NAME).read_text()
    assert run_dir.is_dir()
    assert list(run_dir.iterdir()) == []


def test_the_same_process_is_refused_too(tmp_path):
    with lock.held(tmp_path), pytest.raises(lock.Refused, match=f"process {os.getpid()}"):
        lock.held(tmp_path).__enter__()


def test_folders_stay_if_something_is_in_them(tmp_path):
    with lock.held(tmp_path / "runs" / "a"):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock.held(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "b").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


def test_a_folder_that_was_moved_away_meanwhile_takes_its_lock_along(tmp_path):
    run_dir, moved = tmp_path / "a", tmp_path / "b"
    with lock.held(run_dir):
        run_dir.rename(moved)
        with lock.held(run_dir):
            with pytest.raises(lock.Refused):
                lock.held(moved).__enter__()
            assert (run_dir / lock.NAME).exists()
        (run_dir / "other").mkdir(parents=True)
    assert (run_dir / "other").is_dir()
