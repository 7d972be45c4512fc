"""One writer at a time: whoever writes into a staging folder signs it and keeps the signature fresh.

A writer signs its own folder first and looks at the others' afterwards: of two that start together, at least one sees
the other. Writers of this machine are known by their process; those of other machines by whether they renew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
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
    # Complete or not there, as others take a folder without it for a dead writer's. Not synced, since a power cut ends
    # this one.
    unsigned = folder / f"{LEASE}.new"
    try:
        unsigned.write_bytes(json.dumps(own_lease()).encode())
        os.replace(unsigned, folder / LEASE)
    except FileNotFoundError as error:
        release(folder)
        raise RuntimeError(
            f"another process is saving to this directory, and took {folder.name} away; use one directory a run"
        ) from error

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

    `own` is the staging folder of the caller, already signed. A folder that is not signed goes at once: its writer has
    died, or finds it gone when it signs. One of another machine is watched for up to a minute, by the file system's
    clock, unless its signature is older than that.
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
            elif state in ("dead", "unsigned"):
                # Gone meanwhile, if its writer has just ended.
                with suppress(FileNotFoundError):
                    remove(entry)
    return alive


def _watch(theirs: Path, ours: Path) -> str:
    """`alive` once `theirs` is renewed, `dead` when it was not for long; `unknown` where it goes meanwhile."""
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
    # The command name is in parentheses and may hold spaces; the state is field 3, the start time field 22.
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    # Of one that has ended, and that its parent has not asked for yet, nothing but this is left.
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


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

    Where the file is missing or no lease, the writer is `unsigned`.
    """
    try:
        lease, own = json.loads(path.read_bytes()), own_lease()
        # Before this machine was started again.
        if lease["host"] == own["host"] and lease["boot_id"] != own["boot_id"]:
            return "dead"
        return process_state(lease, own)
    except (OSError, ValueError, KeyError, TypeError):
        return "unsigned"


def machine(lease: Mapping[str, Any]) -> str:
    """What is equal for processes on one machine; its name where it does not say which start of it this is."""
    return str(lease["boot_id"] or lease["host"])


def process_state(lease: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """`dead`, `alive` or `unknown` (another machine or container) for the process of `lease`, seen from that of `own`.

    The process of `own` itself is `dead`: what it still writes, its caller knows.
    """
    pid, start_time = int(lease["pid"]), lease["start_time"]
    if (machine(lease), lease["pid_namespace"]) != (machine(own), own["pid_namespace"]):
        return "unknown"
    if pid == own["pid"] and start_time == own["start_time"]:
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
