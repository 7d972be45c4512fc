"""Folders that are made once and kept, however many processes ask for one at the same time."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where made models are kept: `$AUTOMODEL_CACHE`, else `~/.cache/automodel`. Delete it at will."""
    return Path(os.environ.get("AUTOMODEL_CACHE") or "~/.cache/automodel").expanduser().absolute()


def made_once(name: str, make: Callable[[Path], None], *, waiting_for: str) -> Path:
    """The folder `name` of the cache, which `make` writes where it is not there yet.

    It is written beside its place and renamed: it is there whole or not at all. One process makes it, the others wait,
    and say for what.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    with _locked(folder.with_name(f"{name}.lock"), waiting_for):
        if not folder.is_dir():
            for abandoned in folder.parent.glob(f"{name}.part-*"):
                shutil.rmtree(abandoned)
            with tempfile.TemporaryDirectory(prefix=f"{name}.part-", dir=folder.parent) as temporary:
                make(Path(temporary) / "folder")
                (Path(temporary) / "folder").rename(folder)
    return folder


@contextmanager
def _locked(path: Path, waiting_for: str) -> Iterator[None]:
    """Hold an exclusive lock, which the system drops with the process that holds it, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for {waiting_for} ...", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
