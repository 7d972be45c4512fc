"""One writer at a time: whoever writes into a staging folder signs it and keeps the signature fresh.

A writer signs its own folder first and looks at the others' afterwards: of two that start together, at least one sees
the other. Writers of this machine are known by their process; those of other machines by whether they renew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

from am_ckpt._io import lease_state, own_lease, remove

LEASE = "lease.json"
# What am_ckpt._io.remove has set aside.
_TRASH = re.compile(r"\.trash-.+-[0-9a-f]{8}")
_RENEW_SECONDS = 15.0
# A writer on another machine that has not renewed for so long is dead.
_STALE_SECONDS = 60.0

_renewing: dict[Path, threading.Event] = {}
# Folders that this very process is writing into: its process number alone would not tell them from left ones.
_held: set[Path] = set()


def sign(folder: Path, *, held: bool) -> None:
    """Sign the new staging folder `folder`; a thread renews the signature until `release`.

    `held`: other writers of this process are kept out too. Give it where `release` is sure to be called.
    """
    released = _renewing[folder] = threading.Event()
    if held:
        _held.add(folder)
    # Complete or not there: half of it would make the next writer wait. Not synced, since a power cut ends the writer.
    unsigned = folder / f"{LEASE}.new"
    unsigned.write_bytes(json.dumps(own_lease()).encode())
    os.replace(unsigned, folder / LEASE)

    def renew() -> None:
        while not released.wait(_RENEW_SECONDS):
            try:
                os.utime(folder / LEASE)
            except OSError:
                # The folder is gone: what is written into it fails by itself.
                return

    threading.Thread(target=renew, name="am-ckpt lease", daemon=True).start()


def release(folder: Path) -> None:
    """Stop renewing; from now on anyone may remove the folder. Nothing happens where it was not signed."""
    _held.discard(folder)
    if folder in _renewing:
        _renewing.pop(folder).set()


def clean_stale(directory: Path, prefix: str, own: Path) -> list[str]:
    """Remove unfinished deletes and the staging folders of dead writers; return the names of live writers' folders.

    `own` is the staging folder of the caller, already signed. A folder of another machine is watched for up to a
    minute, by the file system's clock, unless its signature is older than that.
    """
    alive = []
    for entry in sorted(directory.iterdir()):
        if _TRASH.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name.startswith(prefix) and entry != own and entry.is_dir() and not entry.is_symlink():
            state = "alive" if entry in _held else lease_state(entry / LEASE)
            if state == "unknown":
                state = _watch(entry / LEASE, own / LEASE)
            if state == "alive":
                alive.append(entry.name)
            elif state == "dead":
                remove(entry)
    return alive


def _watch(theirs: Path, ours: Path) -> str:
    """`alive` once `theirs` is renewed, `dead` when it was not for long; `unknown` if it is not signed yet."""
    try:
        signed = theirs.stat().st_mtime
        while True:
            os.utime(ours)
            if theirs.stat().st_mtime != signed:
                return "alive"
            if ours.stat().st_mtime - signed > _STALE_SECONDS:
                return "dead"
            time.sleep(0.5)
    except FileNotFoundError:
        return "unknown"
