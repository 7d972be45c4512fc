"""One writer at a time: whoever writes into a staging folder signs it and keeps the signature fresh.

A writer signs its own folder first and looks at the others' afterwards: of two that start together, at least one sees
the other. Writers of this machine are known by their process; those of other machines by whether they renew. (A merge's
staging folder has a lock instead, see `publish.staging_folder`: its writers share a machine.)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

from am_ckpt._copy.publish import remove

LEASE = "lease.json"
# What am_ckpt._copy.publish.remove has set aside.
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


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        # Not Linux, or /proc is hidden: the caller falls back to what it knows.
        return ""


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot, so that a reused pid is told from the old one."""
    # The command name is in parentheses and may hold spaces; the start time is field 22.
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def own_lease() -> dict[str, Any]:
    """Who is writing: enough to tell later whether that process is still alive."""
    return {
        "host": socket.gethostname(),
        "boot_id": _read_text("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "start_time": _start_time(os.getpid()),
        "created": time.time(),
    }


def lease_state(path: Path) -> str:
    """`dead`, `alive` or `unknown` (another machine or container) for the writer named in a lease file.

    A missing or half-written lease is `unknown` during its first minute, then `dead`: the writer died before it
    could sign.
    """
    own = own_lease()
    try:
        lease = json.loads(path.read_bytes())
        pid, start_time = int(lease["pid"]), lease["start_time"]
        place = (lease["boot_id"], lease["pid_namespace"])
        host = lease["host"]
    except (OSError, ValueError, KeyError, TypeError):
        # The folder holds nothing but an unsigned start. Only our own new folder can be that young.
        return "dead" if time.time() - path.parent.stat().st_mtime > 60 else "unknown"
    if place != (own["boot_id"], own["pid_namespace"]):
        return "dead" if host == own["host"] and lease["boot_id"] != own["boot_id"] else "unknown"
    if pid == own["pid"] and start_time == own["start_time"]:
        # Folders that this process still writes into, its caller knows: this writer has ended.
        return "dead"
    if start_time:
        return "alive" if _start_time(pid) == start_time else "dead"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead"
    except PermissionError:
        return "alive"
    return "alive"
